/* The host's own IPv4 addresses, which no guest may reach: read and followed in this one place,
 * from the first time that somebody asks. */
#ifndef ORCH_NET_HOSTADDR_H
#define ORCH_NET_HOSTADDR_H

#include "../base/loop.h"
#include "ruleset.h"

struct orch_hostaddr;

struct orch_hostaddr *orch_hostaddr_new(struct orch_loop *l);
void orch_hostaddr_free(struct orch_hostaddr *h); /* NULL is fine */

/* The addresses, borrowed until the next turn of the loop. Negative with err (class ISOLATION) when
 * they cannot be known: then no filter can be made. */
int orch_hostaddr_get(struct orch_hostaddr *h, const struct orch_cidr **list, size_t *n,
                      struct orch_err *err);

/* Who has filters in force: told when the addresses have changed, or (err) when what they are
 * cannot be read any more, which serves no filter. The next get tries anew. */
void orch_hostaddr_follow(struct orch_hostaddr *h,
                          void (*changed)(void *ud, const struct orch_err *err), void *ud);

#endif
