/* Shared libraries that are loaded when they are first needed, once a process, whichever thread
 * asks first: linked into the program they would cost their load at every start. They stay to the
 * process's end.
 *
 * The user lists the functions in a macro, and makes the struct of their addresses from it: see
 * core/store/db.c. */
#ifndef ORCH_BASE_LIBRARY_H
#define ORCH_BASE_LIBRARY_H

#include "err.h"

struct orch_library {
    const char *what;    /* for whom, in messages: "http" */
    const char *file;    /* "libcurl.so.4" */
    const char *package; /* Debian's, that has it */
    const char *prefix;  /* of its functions' names */
    const char *const *names;
    void *functions; /* a struct of n_bytes of function pointers, in the order of names */
    size_t n_bytes;
    enum orch_class cls; /* of the error when it cannot be had */
    /* called once, with the functions set; not 0: it cannot be used. May be NULL */
    int (*start)(void);
    bool loaded; /* the room's own */
};

/* The file's `library`: table is the struct, LIST(X) the macro, then what is said of it above. */
#define ORCH_LIBRARY(table, LIST, ...) \
    static const char *const library_names[] = { LIST(ORCH_LIBRARY_NAME) }; \
    static struct orch_library library = { \
        .names = library_names, .functions = &(table), .n_bytes = sizeof(table), __VA_ARGS__ \
    }
#define ORCH_LIBRARY_NAME(name) #name,

/* 0, or a negative errno with what to install. A failure is tried again by the next call. */
int orch_library_load(struct orch_library *lib, struct orch_err *err);

#endif
