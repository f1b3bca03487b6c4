#include "netns.h"

#include "link.h"

#include <errno.h>
#include <string.h>

#define WAIT_MS 30000
#define REASON_MS 1000 /* from a failure to what the launcher says of it */
#define CLOSE_MS 50    /* from the end of the filter to its sockets' */
#define TURN_MAX 64    /* packets of announcements a turn */

struct orch_netns {
    struct orch_loop *loop;
    struct orch_netns_opts o;
    struct orch_cell *cell; /* until start hands it over */
    struct orch_timer *deadline;
    struct orch_nft *nft;
    struct orch_nflog *log;
    int route_fd;
    struct orch_watch *watch;
    struct orch_link_events ev;
    bool settings; /* to be made by device */
    bool ready, failing;
    struct orch_err err; /* failing */
};

static void check_uplink(void *ud);

static void stop_waiting(struct orch_netns *n)
{
    orch_timer_cancel(n->deadline);
    orch_watch_free(n->watch);
    n->watch = NULL;
    orch_loop_unpost(n->loop, check_uplink, n);
}

static void fail(struct orch_netns *n, const struct orch_err *err)
{
    stop_waiting(n);
    orch_cell_free(n->cell);
    n->cell = NULL;
    n->o.failed(n->o.ud, err);
}

/* When pasta ends at once, the namespace goes in the midst of what is done to it; the launcher then
 * knows more. */
static void fail_soon(struct orch_netns *n, const struct orch_err *err)
{
    n->failing = true;
    n->err = *err;
    orch_timer_set(n->deadline, REASON_MS);
}

static void late(void *ud)
{
    struct orch_netns *n = ud;
    struct orch_err err;
    if (n->failing) {
        fail(n, &n->err);
        return;
    }
    orch_err_setc(
        &err, ORCH_CLASS_ISOLATION, ETIMEDOUT,
        n->ready ? "network: pasta made no default route within %d s; is the host's own network up?"
                 : "network: the launcher made no namespace within %d s; is the host overloaded?",
        WAIT_MS / 1000);
    fail(n, &err);
}

static void check_uplink(void *ud)
{
    struct orch_netns *n = ud;
    struct orch_err err;
    if (orch_link_catch_up(n->route_fd, &n->ev, &err)) {
        stop_waiting(n);
        fail_soon(n, &err);
        return;
    }
    if (!n->ev.uplink)
        return;
    stop_waiting(n);
    if (orch_link_uplink(n->route_fd, n->ev.uplink, n->o.rules->bandwidth_bits, n->settings, &n->ev,
                         &err))
        fail_soon(n, &err);
    else
        n->o.uplink_up(n->o.ud);
}

static void route_event(void *ud, int events)
{
    struct orch_netns *n = ud;
    (void)events;
    orch_nl_drain(n->route_fd, TURN_MAX, orch_link_note, &n->ev, &n->ev.lost);
    check_uplink(n);
}

static void on_denied(void *ud, const struct orch_denied *d)
{
    struct orch_netns *n = ud;
    const char *rule = orch_rules_marked(n->o.rules, d->mark);
    if (n->o.denied)
        n->o.denied(n->o.ud, rule ? rule : "unknown", d);
}

static int make_filter(struct orch_netns *n, const int fds[ORCH_NET_FDS], struct orch_err *err)
{
    n->route_fd = fds[ORCH_NET_FD_ROUTE];
    orch_nl_setup(n->route_fd);
    n->nft = orch_nft_new(fds[ORCH_NET_FD_NFT], err);
    if (!n->nft) {
        close(fds[ORCH_NET_FD_LOG]);
        return -1;
    }
    n->log = orch_nflog_new(n->loop, fds[ORCH_NET_FD_LOG], on_denied, n, err);
    if (!n->log || orch_nft_commit(n->nft, n->o.rules, err))
        return -1;
    return orch_link_tap(n->route_fd, n->o.rules->bandwidth_bits, n->settings, &n->ev, err);
}

static void on_net(void *ud, const int fds[ORCH_NET_FDS], bool settings)
{
    struct orch_netns *n = ud;
    struct orch_err err;
    n->settings = !settings;
    if (make_filter(n, fds, &err)) {
        fail_soon(n, &err);
        return;
    }
    n->ready = true;
    if (n->o.uplink) {
        orch_timer_set(n->deadline, WAIT_MS);
        n->watch = orch_watch_new(n->loop, n->route_fd, ORCH_READ, route_event, n);
        /* Its route may have been announced during the above. */
        orch_loop_post(n->loop, check_uplink, n);
    } else {
        orch_timer_cancel(n->deadline);
    }
    n->o.ready(n->o.ud);
}

static void on_cell_error(void *ud, const struct orch_err *err)
{
    fail(ud, err);
}

struct orch_netns *orch_netns_new(struct orch_loop *l, struct orch_launcher *la,
                                  const struct orch_netns_opts *o, struct orch_err *err)
{
    struct orch_netns *n = orch_xcalloc(1, sizeof *n);
    n->loop = l;
    n->o = *o;
    n->route_fd = -1;
    struct orch_cell_net_opts c = {
        .flags = (o->uplink ? ORCH_NET_UPLINK : 0) | (o->kvm ? ORCH_VMM_KVM : 0),
        .on_net = on_net,
        .on_error = on_cell_error,
        .ud = n,
    };
    n->deadline = orch_timer_new(l, late, n);
    n->cell = orch_cell_new_net(la, &c, err);
    if (!n->cell) {
        orch_netns_free(n);
        return NULL;
    }
    orch_timer_set(n->deadline, WAIT_MS);
    return n;
}

struct orch_cell *orch_netns_start(struct orch_netns *n, const struct orch_cell_opts *o,
                                   struct orch_err *err)
{
    if (!n->ready || !n->cell) {
        orch_err_setc(err, ORCH_CLASS_ISOLATION, EPROTO,
                      "network: no verified packet filter; the VMM is not started");
        return NULL;
    }
    if (orch_cell_start(n->cell, o, err))
        return NULL;
    return orch_steal_ptr(&n->cell);
}

int orch_netns_rehost(struct orch_netns *n, const struct orch_rules *rules, struct orch_err *err)
{
    if (n->ready)
        orch_nflog_read(n->log);
    n->o.rules = rules;
    return n->ready ? orch_nft_rehost(n->nft, rules, err) : 0;
}

struct orch_nft *orch_netns_nft(struct orch_netns *n)
{
    return n->nft;
}

void orch_netns_free(struct orch_netns *n)
{
    if (!n)
        return;
    orch_cell_free(n->cell);
    orch_timer_free(n->deadline);
    orch_watch_free(n->watch);
    orch_loop_unpost(n->loop, check_uplink, n);
    orch_loop_close(n->loop, orch_nft_release(n->nft), CLOSE_MS);
    orch_loop_close(n->loop, orch_nflog_release(n->log), CLOSE_MS);
    if (n->route_fd >= 0)
        close(n->route_fd);
    free(n);
}
