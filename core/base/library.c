#include "library.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int load(struct orch_library *lib, struct orch_err *err)
{
    void *handle = dlopen(lib->file, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return orch_err_setc(err, lib->cls, ENOENT, "%s: %s cannot be loaded: %s; install %s",
                             lib->what, lib->file, dlerror(), lib->package);
    for (size_t i = 0; i < lib->n_bytes / sizeof(void *); i++) {
        char name[128];
        snprintf(name, sizeof name, "%s%s", lib->prefix, lib->names[i]);
        void *f = dlsym(handle, name);
        if (!f) {
            dlclose(handle);
            return orch_err_setc(err, lib->cls, ENOSYS, "%s: %s lacks %s; install a newer %s",
                                 lib->what, lib->file, name, lib->package);
        }
        memcpy((char *)lib->functions + i * sizeof f, &f, sizeof f);
    }
    if (lib->start && lib->start())
        return orch_err_setc(err, lib->cls, EIO, "%s: %s cannot be started", lib->what, lib->file);
    __atomic_store_n(&lib->loaded, true, __ATOMIC_RELEASE);
    return 0;
}

int orch_library_load(struct orch_library *lib, struct orch_err *err)
{
    if (__atomic_load_n(&lib->loaded, __ATOMIC_ACQUIRE))
        return 0;
    pthread_mutex_lock(&lock);
    int r = lib->loaded ? 0 : load(lib, err);
    pthread_mutex_unlock(&lock);
    return r;
}
