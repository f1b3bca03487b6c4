#include "loop.h"

#include "log.h"

#include <errno.h>
#include <event2/event.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>

#define NEVER INT64_MAX

struct posted {
    struct posted *next;
    orch_loop_fn *fn;
    void *ud;
};

struct signal_watch {
    struct signal_watch *next;
    struct event *ev;
    orch_loop_fn *fn;
    void *ud;
};

struct closing {
    struct closing *next, **link;
    struct orch_timer *timer;
    int fd;
};

/* Of one descriptor: how many watches. */
struct users {
    unsigned readers, writers;
};

struct orch_loop {
    struct event_base *base;
    struct event *wake; /* active while something is posted */
    struct posted *first, **last, *spare;
    struct signal_watch *signals;
    struct closing *closing;
    int64_t now_ms; /* 0: read the clock again */
    bool stopped, stepping;
    /* for orch_loop_fd */
    int fd, timer_fd; /* -1: not asked for */
    struct users *users;
    size_t n_users;
    int64_t tick_us, due_us, armed_us; /* due: no timer is before it; armed: what timer_fd has */
};

struct orch_watch {
    struct orch_loop *loop;
    struct event *ev;
    int fd, events;
    orch_watch_fn *fn;
    void *ud;
    bool first;
};

struct orch_timer {
    struct orch_loop *loop;
    struct event *ev;
    int64_t due_us; /* when libevent's clock, which runs behind, is past it for sure */
    orch_loop_fn *fn;
    void *ud;
};

int64_t orch_now_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

int64_t orch_loop_now_ms(struct orch_loop *l)
{
    if (!l->now_ms)
        l->now_ms = orch_now_us() / 1000;
    return l->now_ms;
}

/* ---- the descriptor that tells of work: an epoll set of our own, since libevent's is not to be
 * had, with what is watched and with a timer for all else */

static void watch_fired(evutil_socket_t fd, short what, void *ud);
static void timer_fired(evutil_socket_t fd, short what, void *ud);

static void arm(struct orch_loop *l)
{
    if (l->fd < 0 || l->stepping)
        return;
    bool now = l->first || event_base_get_num_events(l->base, EVENT_BASE_COUNT_ACTIVE) > 0;
    int64_t us = now ? 0 : l->due_us;
    if (us == l->armed_us)
        return;
    struct itimerspec when = { 0 };
    if (us != NEVER)
        when.it_value = (struct timespec){ us / 1000000,
                                           us % 1000000 * 1000 + 1 }; /* 0: never, to it */
    timerfd_settime(l->timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
    l->armed_us = us;
}

static int find_soonest(const struct event_base *base, const struct event *ev, void *ud)
{
    (void)base;
    struct orch_loop *l = ud;
    if (event_get_callback(ev) != timer_fired)
        return 0;
    const struct orch_timer *t = event_get_callback_arg(ev);
    if (t->due_us < l->due_us)
        l->due_us = t->due_us;
    return 0;
}

/* At the end of a step. Timers that were cancelled still count until their time is over: then all
 * are looked at, and not at each step. */
static void look_ahead(struct orch_loop *l)
{
    if (l->due_us <= orch_now_us()) {
        l->due_us = NEVER;
        event_base_foreach_event(l->base, find_soonest, l);
    }
    arm(l);
}

static uint32_t to_epoll(const struct users *u)
{
    return (u->readers ? EPOLLIN : 0u) | (u->writers ? EPOLLOUT : 0u);
}

/* A watch of fd changes from `before` to `now`. */
static void mirror(struct orch_loop *l, int fd, int before, int now)
{
    if (l->fd < 0 || fd < 0)
        return;
    if ((size_t)fd >= l->n_users) {
        size_t n = ((size_t)fd + 64) / 64 * 64;
        l->users = orch_xrealloc(l->users, n * sizeof *l->users);
        memset(l->users + l->n_users, 0, (n - l->n_users) * sizeof *l->users);
        l->n_users = n;
    }
    struct users *u = &l->users[fd];
    uint32_t had = to_epoll(u);
    u->readers += (unsigned)!!(now & ORCH_READ) - (unsigned)!!(before & ORCH_READ);
    u->writers += (unsigned)!!(now & ORCH_WRITE) - (unsigned)!!(before & ORCH_WRITE);
    struct epoll_event e = { .events = to_epoll(u), .data = { .fd = fd } };
    if (e.events == had)
        return;
    int op = !e.events ? EPOLL_CTL_DEL : had ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    int r = epoll_ctl(l->fd, op, fd, &e);
    if (r < 0 && op != EPOLL_CTL_DEL && (errno == ENOENT || errno == EEXIST)) /* closed meanwhile */
        r = epoll_ctl(l->fd, errno == ENOENT ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &e);
    if (r < 0 && op != EPOLL_CTL_DEL && errno != EPERM) /* a file: libevent refuses it as well */
        orch_log(ORCH_ERROR, "event loop: descriptor %d cannot be watched: %s", fd,
                 strerror(errno));
}

static int mirror_watch(const struct event_base *base, const struct event *ev, void *ud)
{
    (void)base;
    if (event_get_callback(ev) != watch_fired)
        return 0;
    const struct orch_watch *w = event_get_callback_arg(ev);
    mirror(ud, w->fd, 0, w->events);
    return 0;
}

int orch_loop_fd(struct orch_loop *l)
{
    if (l->fd >= 0)
        return l->fd;
    cleanup_close int fd = epoll_create1(EPOLL_CLOEXEC);
    cleanup_close int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct epoll_event e = { .events = EPOLLIN, .data = { .fd = timer } };
    if (fd < 0 || timer < 0 || epoll_ctl(fd, EPOLL_CTL_ADD, timer, &e) < 0)
        return -errno;
    l->fd = orch_steal_fd(&fd);
    l->timer_fd = orch_steal_fd(&timer);
    event_base_foreach_event(l->base, mirror_watch, l);
    arm(l);
    return l->fd;
}

/* ---- the loop */

/* Runs what was posted before this turn; what these functions post waits for the next one. */
static void run_posted(evutil_socket_t fd, short what, void *ud)
{
    (void)fd;
    (void)what;
    struct orch_loop *l = ud;
    l->now_ms = 0;
    struct posted **end = l->last;
    while (l->first) {
        struct posted *p = l->first;
        bool is_last = &p->next == end;
        l->first = p->next;
        if (!l->first)
            l->last = &l->first;
        orch_loop_fn *fn = p->fn;
        void *arg = p->ud;
        p->next = l->spare;
        l->spare = p;
        fn(arg);
        if (is_last)
            break;
    }
    if (l->first) { /* the next turn: libevent drains what becomes active now before it returns */
        static const struct timeval at_once;
        event_add(l->wake, &at_once);
    }
}

struct orch_loop *orch_loop_new(struct orch_err *err)
{
    struct orch_loop *l = orch_xcalloc(1, sizeof *l);
    struct timespec tick;
    clock_getres(CLOCK_MONOTONIC_COARSE, &tick);
    l->tick_us = tick.tv_nsec / 1000 + 1;
    l->last = &l->first;
    l->fd = l->timer_fd = -1;
    l->due_us = l->armed_us = NEVER;
    struct event_config *cfg = event_config_new();
    if (cfg) {
        /* One thread: no locks. The precise timer is not worth a system call a turn. */
        event_config_set_flag(cfg, EVENT_BASE_FLAG_NOLOCK);
        l->base = event_base_new_with_config(cfg);
        event_config_free(cfg);
    }
    if (!l->base) {
        free(l);
        orch_err_set(err, ENOMEM, "event loop: cannot be made (out of descriptors or memory)");
        return NULL;
    }
    event_base_priority_init(l->base, 2); /* all are of the second, but for orch_watch_first */
    l->wake = event_new(l->base, -1, EV_PERSIST, run_posted, l);
    if (!l->wake)
        abort();
    return l;
}

static void close_now(void *ud)
{
    struct closing *c = ud;
    *c->link = c->next;
    if (c->next)
        c->next->link = c->link;
    orch_timer_free(c->timer);
    close(c->fd);
    free(c);
}

void orch_loop_free(struct orch_loop *l)
{
    if (!l)
        return;
    while (l->closing)
        close_now(l->closing);
    while (l->signals) {
        struct signal_watch *s = l->signals;
        l->signals = s->next;
        event_free(s->ev);
        free(s);
    }
    for (int list = 0; list < 2; list++) {
        struct posted *p = list ? l->spare : l->first;
        while (p) {
            struct posted *next = p->next;
            free(p);
            p = next;
        }
    }
    orch_cleanup_close(&l->fd);
    orch_cleanup_close(&l->timer_fd);
    free(l->users);
    event_free(l->wake);
    event_base_free(l->base);
    free(l);
}

void orch_loop_run(struct orch_loop *l)
{
    l->stopped = false;
    while (!l->stopped)
        orch_loop_step(l, -1);
}

static void ignore_timeout(evutil_socket_t fd, short what, void *ud)
{
    (void)fd;
    (void)what;
    (void)ud;
}

void orch_loop_step(struct orch_loop *l, int64_t max_ms)
{
    l->now_ms = 0;
    l->stepping = true;
    if (max_ms == 0) {
        event_base_loop(l->base, EVLOOP_NONBLOCK | EVLOOP_ONCE); /* else until nothing is ready */
    } else if (max_ms > 0) {
        struct timeval tv = { max_ms / 1000, (max_ms % 1000) * 1000 };
        struct event *ev = event_new(l->base, -1, 0, ignore_timeout, NULL);
        if (!ev)
            abort();
        event_add(ev, &tv);
        event_base_loop(l->base, EVLOOP_ONCE);
        event_free(ev);
    } else {
        event_base_loop(l->base, EVLOOP_ONCE | EVLOOP_NO_EXIT_ON_EMPTY);
    }
    l->now_ms = 0;
    l->stepping = false;
    if (l->fd >= 0)
        look_ahead(l);
}

void orch_loop_stop(struct orch_loop *l)
{
    l->stopped = true;
    event_base_loopbreak(l->base);
}

void orch_loop_post(struct orch_loop *l, orch_loop_fn *fn, void *ud)
{
    struct posted *p = l->spare;
    if (p)
        l->spare = p->next;
    else
        p = orch_xmalloc(sizeof *p);
    *p = (struct posted){ NULL, fn, ud };
    if (!l->first)
        event_active(l->wake, 0, 0);
    *l->last = p;
    l->last = &p->next;
    arm(l);
}

void orch_loop_unpost(struct orch_loop *l, orch_loop_fn *fn, void *ud)
{
    for (struct posted **pp = &l->first; *pp;) {
        struct posted *p = *pp;
        if (p->fn != fn || p->ud != ud) {
            pp = &p->next;
            continue;
        }
        /* Left in the list as a no-op (free(NULL)): run_posted may hold its address as this turn's
         * end. */
        p->fn = free;
        p->ud = NULL;
        pp = &p->next;
    }
}

static short to_libevent(int events)
{
    return (short)((events & ORCH_READ ? EV_READ : 0) | (events & ORCH_WRITE ? EV_WRITE : 0));
}

static void watch_fired(evutil_socket_t fd, short what, void *ud)
{
    (void)fd;
    struct orch_watch *w = ud;
    w->loop->now_ms = 0;
    w->fn(w->ud, (what & EV_READ ? ORCH_READ : 0) | (what & EV_WRITE ? ORCH_WRITE : 0));
}

struct orch_watch *orch_watch_new(struct orch_loop *l, int fd, int events, orch_watch_fn *fn,
                                  void *ud)
{
    struct orch_watch *w = orch_xcalloc(1, sizeof *w);
    *w = (struct orch_watch){ .loop = l, .fd = fd, .fn = fn, .ud = ud };
    w->ev = event_new(l->base, fd, (short)(to_libevent(events) | EV_PERSIST), watch_fired, w);
    if (!w->ev)
        abort();
    orch_watch_set(w, events);
    return w;
}

void orch_watch_set(struct orch_watch *w, int events)
{
    if (events == w->events)
        return;
    if (w->events)
        event_del(w->ev);
    mirror(w->loop, w->fd, w->events, events);
    w->events = events;
    if (!events)
        return;
    event_assign(w->ev, w->loop->base, w->fd, (short)(to_libevent(events) | EV_PERSIST),
                 watch_fired, w);
    if (w->first)
        event_priority_set(w->ev, 0);
    event_add(w->ev, NULL);
}

void orch_watch_first(struct orch_watch *w)
{
    int events = w->events;
    w->first = true;
    orch_watch_set(w, 0);
    orch_watch_set(w, events);
}

void orch_watch_free(struct orch_watch *w)
{
    if (!w)
        return;
    mirror(w->loop, w->fd, w->events, 0);
    event_free(w->ev);
    free(w);
}

static void timer_fired(evutil_socket_t fd, short what, void *ud)
{
    (void)fd;
    (void)what;
    struct orch_timer *t = ud;
    t->loop->now_ms = 0;
    t->fn(t->ud);
}

struct orch_timer *orch_timer_new(struct orch_loop *l, orch_loop_fn *fn, void *ud)
{
    struct orch_timer *t = orch_xcalloc(1, sizeof *t);
    *t = (struct orch_timer){ .loop = l, .fn = fn, .ud = ud };
    t->ev = event_new(l->base, -1, 0, timer_fired, t);
    if (!t->ev)
        abort();
    return t;
}

void orch_timer_set(struct orch_timer *t, int64_t ms)
{
    if (ms < 0)
        ms = 0;
    struct timeval tv = { ms / 1000, (ms % 1000) * 1000 };
    event_add(t->ev, &tv);
    t->due_us = ms ? orch_now_us() + ms * 1000 + t->loop->tick_us : 0;
    if (t->due_us < t->loop->due_us)
        t->loop->due_us = t->due_us;
    arm(t->loop);
}

void orch_timer_cancel(struct orch_timer *t)
{
    event_del(t->ev);
}

void orch_timer_free(struct orch_timer *t)
{
    if (!t)
        return;
    event_free(t->ev);
    free(t);
}

void orch_loop_close(struct orch_loop *l, int fd, int64_t ms)
{
    if (fd < 0)
        return;
    struct closing *c = orch_xcalloc(1, sizeof *c);
    *c = (struct closing){ .next = l->closing, .link = &l->closing, .fd = fd };
    if (c->next)
        c->next->link = &c->next;
    l->closing = c;
    c->timer = orch_timer_new(l, close_now, c);
    orch_timer_set(c->timer, ms);
}

static void signal_fired(evutil_socket_t fd, short what, void *ud)
{
    (void)fd;
    (void)what;
    struct signal_watch *s = ud;
    s->fn(s->ud);
}

int orch_loop_signal(struct orch_loop *l, int signo, orch_loop_fn *fn, void *ud)
{
    struct signal_watch *s = orch_xcalloc(1, sizeof *s);
    s->fn = fn;
    s->ud = ud;
    s->ev = evsignal_new(l->base, signo, signal_fired, s);
    if (!s->ev || event_add(s->ev, NULL) < 0) {
        int e = errno;
        if (s->ev)
            event_free(s->ev);
        free(s);
        return -e;
    }
    s->next = l->signals;
    l->signals = s;
    return 0;
}
