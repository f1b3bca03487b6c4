#include "hostaddr.h"

#include "link.h"

#include <errno.h>

struct orch_hostaddr {
    struct orch_loop *loop;
    struct orch_link_watch *watch; /* NULL: not followed, so not known */
    struct orch_cidr *list;
    size_t n;
    void (*changed)(void *ud, const struct orch_err *err);
    void *ud;
};

static void forget(struct orch_hostaddr *h)
{
    orch_link_watch_free(h->watch);
    h->watch = NULL;
    free(h->list);
    h->list = NULL;
    h->n = 0;
}

static int read_all(struct orch_hostaddr *h, struct orch_err *err)
{
    struct orch_cidr *list;
    size_t n;
    int r = orch_link_host(&list, &n, err);
    if (r < 0) {
        forget(h);
        return r;
    }
    free(h->list);
    h->list = list;
    h->n = n;
    return 0;
}

static void on_change(void *ud)
{
    struct orch_hostaddr *h = ud;
    struct orch_err err = { 0 };
    int r = read_all(h, &err);
    if (h->changed)
        h->changed(h->ud, r < 0 ? &err : NULL);
}

int orch_hostaddr_get(struct orch_hostaddr *h, const struct orch_cidr **list, size_t *n,
                      struct orch_err *err)
{
    if (!h->watch) {
        h->watch = orch_link_watch_new(h->loop, on_change, h, err);
        int r = h->watch ? read_all(h, err) : -EIO;
        if (r < 0)
            return r;
    }
    *list = h->list;
    *n = h->n;
    return 0;
}

void orch_hostaddr_follow(struct orch_hostaddr *h,
                          void (*changed)(void *ud, const struct orch_err *err), void *ud)
{
    h->changed = changed;
    h->ud = ud;
}

struct orch_hostaddr *orch_hostaddr_new(struct orch_loop *l)
{
    struct orch_hostaddr *h = orch_xcalloc(1, sizeof *h);
    h->loop = l;
    return h;
}

void orch_hostaddr_free(struct orch_hostaddr *h)
{
    if (!h)
        return;
    forget(h);
    free(h);
}
