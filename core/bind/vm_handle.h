/* Inside core/bind: a microVM as Lua holds it, from the wish on in its owner's list (a call's, or
 * the host's for scripts). It outlives neither the owner nor close(); the object then answers with
 * why. */
#ifndef ORCH_BIND_VM_HANDLE_H
#define ORCH_BIND_VM_HANDLE_H

#include "bind.h"

#include "../call/call.h"
#include "../vm/vm.h"

#define ORCH_VM_META "orch.vm"

/* Shared by the Lua object, its owner and what is under way; freed with the last of them. */
struct orch_vm_handle {
    struct orch_vm_handle *next;
    struct orch_vm_handle **list; /* the owner's, while owned */
    unsigned refs;
    /* NULL when it is over, see err; ask orch_vm_handle_channel() for it */
    struct orch_vm *vm;
    struct orch_err err;    /* why it is over */
    struct orch_call *call; /* the owner; NULL: the host, or it is over */
    lua_State *main;
    struct orch_env *env;
    struct orch_vm_operation *operations;
    /* While it is spawned: its task waits; the call's time stands still. */
    struct orch_wait wait;
    bool waiting, held;
    /* What it was stays known. */
    char id[16];
    char *image;
    uint64_t memory_bytes;
    const char *backend, *isolation;
    double spawn_ms;
};

/* A wait of one exec or file operation. */
struct orch_vm_operation {
    struct orch_vm_operation *next, **at;
    struct orch_vm_handle *h;
    struct orch_wait wait;
    struct orch_exec *exec;
    struct orch_fileop *file;
    struct orch_buf out, err_out, in;
    size_t in_sent;
    int on_stdout, on_stderr;     /* registry references */
    bool inherit_in, inherit_out; /* the process's own stdin; stdout and stderr */
    /* stdin cannot be watched (a file, /dev/null): it is read when there is room */
    bool stdin_file;
    struct orch_watch *stdin_watch;
    struct orch_vm_outlet {
        struct orch_vm_operation *op;
        struct orch_watch *watch; /* while its reader is behind */
        struct orch_buf pending;
        int fd;
        bool closed; /* nobody reads it any more */
        int failed;  /* errno: it cannot be written for another reason */
    } outlets[2];
    bool ended;      /* the command has, its output is still being written */
    bool capped;     /* it was to get more time than there is */
    char limit[200]; /* of its time, for people; empty: none */
    int64_t begun_us;
    uint64_t max_output;
    struct orch_exec_result result;
    struct orch_err err;
    int (*push)(lua_State *L, struct orch_vm_operation *op);
    /* beside its error; NULL: nothing is */
    int (*so_far)(lua_State *L, struct orch_vm_operation *op);
};

struct orch_vm_handle *orch_vm_handle_at(lua_State *L); /* of the object at 1; raises */
/* The one way to a handle's microVM, right before it is used: its channel, or NULL with nil,
 * message, code pushed when it is over, whether the handle was told so already or not. */
struct orch_channel *orch_vm_handle_channel(lua_State *L, const struct orch_vm_handle *h,
                                            int *n_results);
/* Ends the microVM; what is under way fails with why, as everything later does. */
void orch_vm_handle_close(struct orch_vm_handle *h, const char *why);
void orch_vm_handle_unref(struct orch_vm_handle *h);

struct orch_vm_operation *orch_vm_operation_new(struct orch_vm_handle *h,
                                                int (*push)(lua_State *L,
                                                            struct orch_vm_operation *op));
void orch_vm_operation_free(struct orch_vm_operation *op);
void orch_vm_operation_ready(struct orch_vm_operation *op); /* its task goes on */
void orch_vm_operation_cancel(void *op);                    /* for orch_task_wait */

/* The methods of the object (lua_exec.c). */
int orch_vm_handle_exec(lua_State *L), orch_vm_handle_write_file(lua_State *L),
    orch_vm_handle_read_file(lua_State *L), orch_vm_handle_list_dir(lua_State *L);

#endif
