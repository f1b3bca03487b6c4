#include "tar.h"

#include <stdio.h>
#include <string.h>

/* False: no tar. */
static bool head(struct orch_tar *t)
{
    char name[260], *end, number[13] = "", type = t->head[156];
    unsigned sum = 0, want;
    memcpy(number, t->head + 124, 12);
    t->left = strtoull(number, &end, 8);
    if (!t->head[0]) { /* the end, blocks of zeros */
        t->left = t->pad = 0;
        return true;
    }
    memcpy(number, t->head + 148, 8);
    number[8] = 0;
    want = (unsigned)strtoul(number, NULL, 8);
    memset(t->head + 148, ' ', 8);
    for (size_t i = 0; i < sizeof t->head; i++)
        sum += (unsigned char)t->head[i];
    if (sum != want || (*end && *end != ' '))
        return false;
    t->pad = -t->left & 511;
    snprintf(name, sizeof name, "%.155s%s%.100s", t->head + 345, t->head[345] ? "/" : "", t->head);
    if (type == 'L') {
        t->longname.n = 0;
        t->keep = t->left < 4096 ? &t->longname : NULL;
    } else {
        bool file = type == '0' || !type;
        t->keep = file ? t->into(t->ud, t->longname.n ? t->longname.p : name, t->left) : NULL;
        t->longname.n = 0;
    }
    return true;
}

void orch_tar_feed(struct orch_tar *t, const char *p, size_t n)
{
    while (n && !t->failed) {
        size_t k;
        if (t->left) {
            k = n < t->left ? n : (size_t)t->left;
            if (t->keep)
                orch_buf_add(t->keep, p, k);
            t->left -= k;
        } else if (t->pad) {
            k = n < t->pad ? n : (size_t)t->pad;
            t->pad -= k;
        } else {
            k = sizeof t->head - t->n_head < n ? sizeof t->head - t->n_head : n;
            memcpy(t->head + t->n_head, p, k);
            t->n_head += k;
            if (t->n_head == sizeof t->head) {
                t->n_head = 0;
                t->failed = !head(t);
            }
        }
        p += k;
        n -= k;
    }
}

void orch_tar_restart(struct orch_tar *t)
{
    t->n_head = t->longname.n = 0;
    t->left = t->pad = 0;
}

void orch_tar_fini(struct orch_tar *t)
{
    orch_buf_free(&t->longname);
}
