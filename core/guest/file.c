/* Files of the guest, read, written and listed for the host, a frame at a time. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LIST_ENTRIES 65536

int open_regular(const char *path, int flags)
{
    struct stat st;
    int fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode))
        return fd;
    close(fd);
    errno = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    return -1;
}

static void file_end(struct op *op, int error)
{
    send_done(op->id, error, op->bytes);
    op_free(op);
}

static int write_open(struct op *op, const struct orch_wire_file *f)
{
    struct stat st;
    struct user u;
    char uid[16];
    snprintf(uid, sizeof uid, "%u", f->uid);
    if (lstat(op->path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISLNK(st.st_mode))
        return S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    const char *slash = strrchr(op->path, '/');
    char *temp;
    if (asprintf(&temp, "%.*s.orch-write-%u", slash ? (int)(slash + 1 - op->path) : 0, op->path,
                 op->id) < 0)
        return ENOMEM;
    op->fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (op->fd < 0) {
        int error = errno;
        free(temp);
        return error;
    }
    op->temp = temp;
    if (!user_find(uid, &u) || fchown(op->fd, u.uid, u.gid) < 0 ||
        fchmod(op->fd, f->mode & 07777) < 0)
        return errno;
    return 0;
}

void write_data(struct op *op, const void *b, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t k = write(op->fd, (const char *)b + done, n - done);
        if (k < 0 && errno != EINTR) {
            file_end(op, errno);
            return;
        }
        done += k > 0 ? (size_t)k : 0;
    }
    op->bytes += n;
    if (n) {
        send_credit(op, (uint32_t)n);
        return;
    }
    int error = rename(op->temp, op->path) < 0 ? errno : 0;
    if (!error) {
        free(op->temp);
        op->temp = NULL;
    }
    file_end(op, error);
}

static int read_open(struct op *op, const struct orch_wire_file *f)
{
    op->left = f->length ? f->length : UINT64_MAX;
    if ((op->fd = open_regular(op->path, O_RDONLY)) < 0)
        return errno;
    if (f->offset > INT64_MAX)
        return EINVAL;
    return lseek(op->fd, (off_t)f->offset, SEEK_SET) < 0 ? errno : 0;
}

static int list_open(struct op *op)
{
    int fd = open(op->path, O_RDONLY | O_DIRECTORY | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && (op->dir = fdopendir(fd)))
        return 0;
    int error = errno;
    close_fd(&fd);
    return error;
}

void file_frame(uint32_t id, enum kind kind, const char *b, size_t n)
{
    struct orch_wire_file f = { 0 };
    size_t head = kind == LIST ? 0 : sizeof f;
    if (op_find(id) || n < head)
        die("protocol error: file operation");
    memcpy(&f, b, head);
    struct op *op = n_ops < MAX_OPS ? op_new(id, kind) : NULL;
    if (!op || !(op->path = strndup(b + head, n - head))) {
        send_done(id, EAGAIN, 0);
        if (op)
            op_free(op);
        return;
    }
    int error;
    if (strlen(op->path) != n - head)
        error = EINVAL;
    else
        error = kind == LIST   ? list_open(op)
                : kind == READ ? read_open(op, &f)
                               : write_open(op, &f);
    if (error)
        file_end(op, error);
}

void read_turn(struct op *op)
{
    size_t want = op->left < CHUNK ? (size_t)op->left : CHUNK;
    ssize_t n = want ? read(op->fd, out_room(CHUNK), want) : 0;
    if (n <= 0) {
        file_end(op, n < 0 ? errno : 0);
        return;
    }
    op->left -= (uint64_t)n;
    op->bytes += (uint64_t)n;
    out_commit(op->id, ORCH_WIRE_DATA, (size_t)n);
}

static char type_letter(mode_t m)
{
    return S_ISREG(m)    ? 'f'
           : S_ISDIR(m)  ? 'd'
           : S_ISLNK(m)  ? 'l'
           : S_ISFIFO(m) ? 'p'
           : S_ISSOCK(m) ? 's'
           : S_ISCHR(m)  ? 'c'
                         : 'b';
}

void list_turn(struct op *op)
{
    char *b = (char *)out_room(CHUNK);
    size_t n = 0;
    struct dirent *e = NULL;
    errno = 0;
    while (n < CHUNK - 512 && op->entries < LIST_ENTRIES && (e = readdir(op->dir))) {
        struct stat st;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 ||
            fstatat(dirfd(op->dir), e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        n += (size_t)snprintf(b + n, CHUNK - n, "%c %04o %lld %lld %s", type_letter(st.st_mode),
                              st.st_mode & 07777, (long long)st.st_size, (long long)st.st_mtime,
                              e->d_name) +
             1;
        op->entries++;
    }
    int error = errno;
    op->bytes += n;
    if (n)
        out_commit(op->id, ORCH_WIRE_DATA, n);
    if (!e)
        file_end(op, op->entries < LIST_ENTRIES ? error : EFBIG);
}
