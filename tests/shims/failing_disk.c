/* Preloaded into a job's processes: calls on files below one folder fail with EIO, as a dying disk's do.
 *
 * EVERSTEP_TEST_DISK names a control file of 4096 bytes that the test maps too and changes while the job runs:
 * byte 0: fail reads, 1: writes, 2: fsync; byte 3: how many of 100 such calls fail; from 8 on: the folder, NUL-ended.
 * All zero: nothing fails, and a call costs one look at memory.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READS, WRITES, SYNCS, PERCENT, FOLDER = 8, CONTROL_BYTES = 4096 };

static const volatile unsigned char *control;
static __thread unsigned int dice;

__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("EVERSTEP_TEST_DISK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *mapped = mmap(NULL, CONTROL_BYTES, PROT_READ, MAP_SHARED, fd, 0);
    control = mapped == MAP_FAILED ? NULL : mapped;
    close(fd);
}

static int befalls(int what, int fd) {
    char link[64], path[PATH_MAX], folder[CONTROL_BYTES - FOLDER];
    if (!control || !control[what])
        return 0;
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    memcpy(folder, (const void *)(control + FOLDER), sizeof folder);
    size_t wanted = strnlen(folder, sizeof folder);
    if (length < 0 || !wanted || (size_t)length < wanted || memcmp(path, folder, wanted))
        return 0;
    if (!dice)
        dice = (unsigned int)getpid() * 2654435761u + (unsigned int)(size_t)&dice;
    return rand_r(&dice) % 100 < control[PERCENT];
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)
#define GUARD(name, what, fd, ...) \
    NEXT(name); \
    if (befalls(what, fd)) { errno = EIO; return -1; } \
    return next(fd, __VA_ARGS__)

ssize_t read(int fd, void *data, size_t size) { GUARD(read, READS, fd, data, size); }
ssize_t pread(int fd, void *data, size_t size, off_t at) { GUARD(pread, READS, fd, data, size, at); }
ssize_t pread64(int fd, void *data, size_t size, off64_t at) { GUARD(pread64, READS, fd, data, size, at); }
ssize_t readv(int fd, const struct iovec *v, int n) { GUARD(readv, READS, fd, v, n); }
ssize_t preadv(int fd, const struct iovec *v, int n, off_t at) { GUARD(preadv, READS, fd, v, n, at); }
ssize_t preadv64(int fd, const struct iovec *v, int n, off64_t at) { GUARD(preadv64, READS, fd, v, n, at); }
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int f) { GUARD(preadv2, READS, fd, v, n, at, f); }
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off64_t at, int f) { GUARD(preadv64v2, READS, fd, v, n, at, f); }
ssize_t write(int fd, const void *data, size_t size) { GUARD(write, WRITES, fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { GUARD(pwrite, WRITES, fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { GUARD(pwrite64, WRITES, fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *v, int n) { GUARD(writev, WRITES, fd, v, n); }

int fsync(int fd) {
    NEXT(fsync);
    if (befalls(SYNCS, fd)) { errno = EIO; return -1; }
    return next(fd);
}

int fdatasync(int fd) {
    NEXT(fdatasync);
    if (befalls(SYNCS, fd)) { errno = EIO; return -1; }
    return next(fd);
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    NEXT(sendfile64);
    if (befalls(READS, in)) { errno = EIO; return -1; }
    return next(out, in, at, size);
}

ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    NEXT(sendfile);
    if (befalls(READS, in)) { errno = EIO; return -1; }
    return next(out, in, at, size);
}
