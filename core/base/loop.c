#include "loop.h"

#include <errno.h>
#include <event2/event.h>
#include <time.h>

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

struct orch_loop {
    struct event_base *base;
    struct event *wake; /* active while something is posted */
    struct posted *first, **last, *spare;
    struct signal_watch *signals;
    struct closing *closing;
    int64_t now_ms; /* 0: read the clock again */
    bool stopped;
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
    l->last = &l->first;
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
    if (max_ms == 0) {
        event_base_loop(l->base, EVLOOP_NONBLOCK);
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
