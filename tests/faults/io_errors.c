/* Makes reads or writes of some files fail, as a failing disk or a stale mount does. Loaded by LD_PRELOAD.

   While the file $FAULT_SWITCH exists, calls on files whose path contains $FAULT_PATH fail with errno $FAULT_ERRNO:
   opening and reading if $FAULT_MODE is "r", opening for writing, writing and syncing if it is "w". At most
   $FAULT_COUNT calls of a process fail; 0 is no limit. Each is noted in $FAULT_SWITCH.count, a byte for each. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int failed;

static int fails(const char *path, char mode) {
    const char *where = getenv("FAULT_PATH"), *wanted = getenv("FAULT_MODE"), *on = getenv("FAULT_SWITCH");
    const char *number = getenv("FAULT_ERRNO"), *count = getenv("FAULT_COUNT");
    if (!where || !wanted || !on || !number || !path || wanted[0] != mode || !strstr(path, where)) return 0;
    if (syscall(SYS_faccessat, AT_FDCWD, on, F_OK) != 0) return 0;
    int most = count ? atoi(count) : 0;
    if (atomic_fetch_add(&failed, 1) >= most && most > 0) return 0;
    char noted[4096];
    snprintf(noted, sizeof noted, "%s.count", on);
    int file = syscall(SYS_openat, AT_FDCWD, noted, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (file >= 0) {
        syscall(SYS_write, file, ".", 1);
        syscall(SYS_close, file);
    }
    errno = atoi(number);
    return 1;
}

static int fails_at(int file, char mode) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path, mode);
}

static int open_fails(const char *path, int flags) {
    if (flags & O_DIRECTORY) return 0;
    return fails(path, (flags & O_ACCMODE) == O_RDONLY ? 'r' : 'w');
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        int mode = va_arg(rest, int);                                                                                  \
        va_end(rest);                                                                                                  \
        return open_fails(path, flags) ? -1 : REAL(name)(path, flags, mode);                                           \
    }
#define OPENAT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...) {                                                        \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        int mode = va_arg(rest, int);                                                                                  \
        va_end(rest);                                                                                                  \
        return open_fails(path, flags) ? -1 : REAL(name)(directory, path, flags, mode);                                \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int file, void *data, size_t size) { return fails_at(file, 'r') ? -1 : REAL(read)(file, data, size); }
ssize_t pread(int file, void *data, size_t size, off_t at) {
    return fails_at(file, 'r') ? -1 : REAL(pread)(file, data, size, at);
}
ssize_t pread64(int file, void *data, size_t size, off64_t at) {
    return fails_at(file, 'r') ? -1 : REAL(pread64)(file, data, size, at);
}
ssize_t write(int file, const void *data, size_t size) {
    return fails_at(file, 'w') ? -1 : REAL(write)(file, data, size);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return fails_at(file, 'w') ? -1 : REAL(pwrite64)(file, data, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return fails_at(file, 'w') ? -1 : REAL(writev)(file, parts, count);
}
int fsync(int file) { return fails_at(file, 'w') ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails_at(file, 'w') ? -1 : REAL(fdatasync)(file); }
