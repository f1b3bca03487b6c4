/* In the VMM's place: a guest that is the test's own. Each frame from the agent's socket goes
 * into the tap, each frame from the tap to the socket. Static, behind all of the launcher's
 * confinement. */
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define AGENT 11 /* ORCH_VMM_FD_BASE + ORCH_LAUNCH_FD_AGENT */
#define TAP 18   /* ORCH_VMM_FD_BASE + ORCH_LAUNCH_FD_TAP */
#define HEAD 10  /* struct virtio_net_hdr */

int main(int argc, char **argv)
{
    static char frame[HEAD + 65536];
    (void)argv;
    if (argc > 1 && write(1, "up\n", 3) != 3)
        return 1;
    for (struct pollfd pf[2] = { { AGENT, POLLIN, 0 }, { TAP, POLLIN, 0 } }; poll(pf, 2, -1) > 0;) {
        if (pf[0].revents) {
            memset(frame, 0, HEAD);
            ssize_t n = recv(AGENT, frame + HEAD, sizeof frame - HEAD, 0);
            if (n <= 0)
                return 0;
            if (write(TAP, frame, HEAD + (size_t)n) < 0 && pf[0].revents)
                perror("tap");
        }
        if (pf[1].revents) {
            ssize_t n = read(TAP, frame, sizeof frame);
            if (n > HEAD)
                send(AGENT, frame + HEAD, (size_t)n - HEAD, MSG_DONTWAIT);
        }
    }
    return 1;
}
