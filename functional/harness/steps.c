/* Counts the steps a process takes on the file system, and lets one of them go wrong.
 *
 * Loaded with LD_PRELOAD, so nothing of it is in the agent. What is a step: a call of libc that
 * changes something at or below the paths in BOOTWRIGHT_STEPS_BELOW (separated by colons), by
 * whatever name or descriptor. What is to happen at which step is read from the file
 * BOOTWRIGHT_STEPS, shared memory that functional/harness/steps.py writes while the process runs.
 * A fork of the process counts with it; a program it starts does not, for the agent gives no
 * program its environment.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define FICLONE 0x40049409

enum {
    CREATE = 1, WRITE = 2, RESIZE = 4, SYNC = 8, RENAME = 16, LINK = 32,
    REMOVE = 64, MKDIR = 128, ATTRIBUTES = 256, COPY = 512, ALLOCATE = 1024,
};

enum { KILL = 1, FAIL = 2, SHORTEN = 3, TEAR = 4 };

/* steps.py knows this layout. */
struct control {
    uint64_t count;   /* steps since it was armed */
    uint64_t at;      /* the step that goes wrong; 0: none */
    uint32_t armed;
    uint32_t action;
    uint32_t kinds;   /* which count at all */
    int32_t error;    /* errno of FAIL */
    int32_t pid;      /* whom KILL ends: the agent, whichever of its forks takes the step */
    uint32_t hit;
    char what[472];
};

static volatile struct control *control;
static const char *below;

__attribute__((constructor)) static void prepare(void)
{
    const char *path = getenv("BOOTWRIGHT_STEPS");
    below = getenv("BOOTWRIGHT_STEPS_BELOW");
    if (path == NULL || below == NULL)
        return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *memory = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory != MAP_FAILED)
        control = memory;
}

static int watched(const char *path)
{
    for (const char *prefix = below; *prefix;) {
        size_t length = strcspn(prefix, ":");
        if (strncmp(path, prefix, length) == 0)
            return 1;
        prefix += length + (prefix[length] == ':');
    }
    return 0;
}

static void of_descriptor(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void die(void)
{
    kill(control->pid, SIGKILL);
}

/* What is to become of a step: 0 for nothing unusual, else an action. */
static uint32_t taken(uint32_t kind, const char *path)
{
    if (!(control->kinds & kind) || !watched(path))
        return 0;
    if (__atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST) != control->at)
        return 0;
    snprintf((char *)control->what, sizeof control->what, "%u %s", kind, path);
    control->hit = 1;
    if (control->action == KILL)
        die();
    return control->action;
}

static uint32_t step_at(uint32_t kind, int directory, const char *path)
{
    char whole[2 * PATH_MAX];
    if (control == NULL || !control->armed)
        return 0;
    int before = errno;
    if (path == NULL) {
        of_descriptor(directory, whole);
    } else if (path[0] == '/' || directory == AT_FDCWD) {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        of_descriptor(directory, whole);
        size_t length = strlen(whole);
        snprintf(whole + length, sizeof whole - length, "/%s", path);
    }
    uint32_t action = taken(kind, whole);
    errno = before;
    return action;
}

static int fails(uint32_t action)
{
    if (action != FAIL)
        return 0;
    errno = control->error;
    return 1;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (real == NULL) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* A call that either happens or does not. */
#define PLAIN(result, name, parameters, arguments, kind, directory, path) \
    result name parameters \
    { \
        REAL(name); \
        if (fails(step_at(kind, directory, path))) \
            return -1; \
        return real arguments; \
    }

#define OPEN(name, parameters, arguments, directory) \
    int name parameters \
    { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        if ((flags & (O_CREAT | O_TRUNC)) && fails(step_at(CREATE, directory, path))) \
            return -1; \
        return real arguments; \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int fd, const char *path, int flags, ...), (fd, path, flags, mode), fd)
OPEN(openat64, (int fd, const char *path, int flags, ...), (fd, path, flags, mode), fd)

/* A call that may do a part of its work: `whole` bytes, or `half` of them. */
#define PARTIAL(name, parameters, whole, half, kind) \
    ssize_t name parameters \
    { \
        REAL(name); \
        uint32_t action = step_at(kind, fd, NULL); \
        if (fails(action)) \
            return -1; \
        if ((action != SHORTEN && action != TEAR) || count < 2) \
            return real whole; \
        ssize_t done = real half; \
        if (action == TEAR) \
            die(); \
        return done; \
    }

PARTIAL(write, (int fd, const void *data, size_t count), (fd, data, count),
        (fd, data, count / 2), WRITE)
PARTIAL(pwrite, (int fd, const void *data, size_t count, off_t at), (fd, data, count, at),
        (fd, data, count / 2, at), WRITE)
PARTIAL(pwrite64, (int fd, const void *data, size_t count, off64_t at), (fd, data, count, at),
        (fd, data, count / 2, at), WRITE)
PARTIAL(writev, (int fd, const struct iovec *data, int count), (fd, data, count),
        (fd, data, count / 2), WRITE)
PARTIAL(pwritev, (int fd, const struct iovec *data, int count, off_t at), (fd, data, count, at),
        (fd, data, count / 2, at), WRITE)
PARTIAL(pwritev64, (int fd, const struct iovec *data, int count, off64_t at),
        (fd, data, count, at), (fd, data, count / 2, at), WRITE)

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags)
{
    REAL(copy_file_range);
    uint32_t action = step_at(COPY, out, NULL);
    if (fails(action))
        return -1;
    if ((action == SHORTEN || action == TEAR) && count > 1)
        count /= 2;
    ssize_t done = real(in, from, out, to, count, flags);
    if (action == TEAR)
        die();
    return done;
}

int ioctl(int fd, unsigned long request, ...)
{
    REAL(ioctl);
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (request == FICLONE && fails(step_at(COPY, fd, NULL)))
        return -1;
    return real(fd, request, argument);
}

/* They return the error. */
#define ALLOCATING(name, parameters, arguments) \
    int name parameters \
    { \
        REAL(name); \
        if (fails(step_at(ALLOCATE, fd, NULL))) \
            return control->error; \
        return real arguments; \
    }

ALLOCATING(posix_fallocate, (int fd, off_t at, off_t count), (fd, at, count))
ALLOCATING(posix_fallocate64, (int fd, off64_t at, off64_t count), (fd, at, count))

PLAIN(int, fallocate, (int fd, int mode, off_t at, off_t count), (fd, mode, at, count),
      ALLOCATE, fd, NULL)
PLAIN(int, fallocate64, (int fd, int mode, off64_t at, off64_t count), (fd, mode, at, count),
      ALLOCATE, fd, NULL)
PLAIN(int, ftruncate, (int fd, off_t size), (fd, size), RESIZE, fd, NULL)
PLAIN(int, ftruncate64, (int fd, off64_t size), (fd, size), RESIZE, fd, NULL)
PLAIN(int, truncate, (const char *path, off_t size), (path, size), RESIZE, AT_FDCWD, path)
PLAIN(int, truncate64, (const char *path, off64_t size), (path, size), RESIZE, AT_FDCWD, path)
PLAIN(int, fsync, (int fd), (fd), SYNC, fd, NULL)
PLAIN(int, fdatasync, (int fd), (fd), SYNC, fd, NULL)
PLAIN(int, rename, (const char *old, const char *new), (old, new), RENAME, AT_FDCWD, new)
PLAIN(int, renameat, (int a, const char *old, int b, const char *new), (a, old, b, new),
      RENAME, b, new)
PLAIN(int, link, (const char *old, const char *new), (old, new), LINK, AT_FDCWD, new)
PLAIN(int, linkat, (int a, const char *old, int b, const char *new, int flags),
      (a, old, b, new, flags), LINK, b, new)
PLAIN(int, symlink, (const char *to, const char *path), (to, path), LINK, AT_FDCWD, path)
PLAIN(int, unlink, (const char *path), (path), REMOVE, AT_FDCWD, path)
PLAIN(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), REMOVE, fd, path)
PLAIN(int, rmdir, (const char *path), (path), REMOVE, AT_FDCWD, path)
PLAIN(int, mkdir, (const char *path, mode_t mode), (path, mode), MKDIR, AT_FDCWD, path)
PLAIN(int, mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), MKDIR, fd, path)
PLAIN(int, chmod, (const char *path, mode_t mode), (path, mode), ATTRIBUTES, AT_FDCWD, path)
PLAIN(int, fchmod, (int fd, mode_t mode), (fd, mode), ATTRIBUTES, fd, NULL)
PLAIN(int, fchmodat, (int fd, const char *path, mode_t mode, int flags), (fd, path, mode, flags),
      ATTRIBUTES, fd, path)
PLAIN(int, futimens, (int fd, const struct timespec times[2]), (fd, times), ATTRIBUTES, fd, NULL)
PLAIN(int, utimensat, (int fd, const char *path, const struct timespec times[2], int flags),
      (fd, path, times, flags), ATTRIBUTES, fd, path)
