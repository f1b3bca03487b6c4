/* The server's listening socket, TCP or local, and who connects to it. */
#ifndef ORCH_HTTP_LISTEN_H
#define ORCH_HTTP_LISTEN_H

#include "../base/loop.h"
#include "../base/unix.h"
#include "wire.h"

struct orch_http_listener {
    /* fd is its from then on. Must not end the listener. */
    void (*accepted)(void *ud, int fd, const struct orch_http_peer *peer);
    void *ud;
    char *address;    /* with the real port */
    uint64_t refused; /* of other users, closed */
    /* the room's own */
    int fd;
    struct orch_unix_listener local; /* the same fd; absent over TCP */
    struct orch_watch *watch;
    struct orch_timer *retry;
};

/* where: as struct orch_http_server_opts has it. Zeroed but for accepted and ud before; to be ended
 * with fini also when this fails. */
int orch_http_listen(struct orch_http_listener *l, struct orch_loop *loop, const char *where,
                     struct orch_err *err);
/* Closes the socket; the address stays. */
void orch_http_listener_stop(struct orch_http_listener *l);
void orch_http_listener_fini(struct orch_http_listener *l);

#endif
