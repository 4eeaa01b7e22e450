// Preloaded into a process: makes the k-th system call that changes a dataset fail, fall short, or be the last one.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { TRACE, KILL, KILL_WITHIN, FAIL, SHORT, NO_DIRECT };

static volatile long left = -1;  // calls until it happens; counts no further where it is negative
static volatile int armed, report;
static enum mode mode;
static int error;
static char folder[4096];

// From now on: `mode` at call number k of those that concern paths under `under`; `fd` hears of it.
void arm(long k, int how, int code, int fd, const char* under) {
  left = k, mode = (enum mode)how, error = code, report = fd;
  strncpy(folder, under, sizeof(folder) - 1);
  armed = 1;
}

static void tell(const char* name, const char* path) {
  char line[4300];
  const char* within = path + strlen(folder);
  const int n = snprintf(line, sizeof(line), "%s %s\n", name, *within ? within + 1 : ".");
  syscall(SYS_write, report, line, n);
}

static void end(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

// Whether this call is the one; a call of another folder never is. Dies here where the mode says so.
static int due(const char* name, const char* path, int is_write) {
  if (!armed || strncmp(path, folder, strlen(folder)) != 0) return 0;
  const int now = __atomic_fetch_sub(&left, 1, __ATOMIC_SEQ_CST) == 0;
  if (mode == TRACE || (now && mode != NO_DIRECT)) tell(name, path);
  if (mode == TRACE || mode == NO_DIRECT || !now) return 0;
  if (mode == KILL || (mode == KILL_WITHIN && !is_write)) end();
  return mode == FAIL || is_write;
}

static int path_of(int fd, char* path, size_t size) {
  char link[64];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, size - 1);
  path[n < 0 ? 0 : n] = 0;
  return n > 0;
}

static int due_fd(const char* name, int fd, int is_write) {
  char path[4096];
  return armed && path_of(fd, path, sizeof(path)) && due(name, path, is_write);
}

// The same for a write at a place, which is told of too: the header comes last.
static int due_at(int fd, long long at) {
  char path[4096];
  if (!armed || !path_of(fd, path, 4000)) return 0;
  sprintf(path + strlen(path), "@%lld", at);
  return due("pwrite", path, 1);
}

// Whether a write past the cache is to be refused, as by a filesystem that takes the flag and can't do it.
static int refused(int fd) {
  char path[4096];
  if (!armed || mode != NO_DIRECT || !(fcntl(fd, F_GETFL) & O_DIRECT) || !path_of(fd, path, sizeof(path))) return 0;
  tell("refused", path);
  return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAILS return errno = error, -1

#define PWRITE(name, offset)                                                  \
  ssize_t name(int fd, const void* data, size_t n, offset at) {               \
    if (refused(fd)) return errno = EINVAL, -1;                               \
    if (!due_at(fd, at)) return NEXT(name)(fd, data, n, at);                  \
    if (mode == FAIL) FAILS;                                                  \
    const ssize_t written = NEXT(name)(fd, data, n / 2, at);                  \
    if (mode == KILL_WITHIN) end();                                           \
    return written;                                                           \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void* data, size_t n) {
  if (!due_fd("write", fd, 1)) return NEXT(write)(fd, data, n);
  if (mode == FAIL) FAILS;
  const ssize_t written = NEXT(write)(fd, data, n / 2);
  if (mode == KILL_WITHIN) end();
  return written;
}

ssize_t pwritev(int fd, const struct iovec* parts, int n, off_t at) {
  if (due_fd("pwritev", fd, 0)) FAILS;
  return NEXT(pwritev)(fd, parts, n, at);
}

#define OPEN(name)                                          \
  int name(const char* path, int flags, ...) {              \
    va_list rest;                                           \
    va_start(rest, flags);                                  \
    const mode_t bits = va_arg(rest, mode_t);               \
    va_end(rest);                                           \
    if (due("open", path, 0)) FAILS;                        \
    return NEXT(name)(path, flags, bits);                   \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                        \
  int name(int at, const char* path, int flags, ...) {      \
    va_list rest;                                           \
    va_start(rest, flags);                                  \
    const mode_t bits = va_arg(rest, mode_t);               \
    va_end(rest);                                           \
    if (due("open", path, 0)) FAILS;                        \
    return NEXT(name)(at, path, flags, bits);               \
  }
OPENAT(openat)
OPENAT(openat64)

#define OF_FD(name, ...)                                    \
  if (due_fd(#name, fd, 0)) FAILS;                          \
  return NEXT(name)(__VA_ARGS__)
int fsync(int fd) { OF_FD(fsync, fd); }
int fdatasync(int fd) { OF_FD(fdatasync, fd); }
int ftruncate(int fd, off_t n) { OF_FD(ftruncate, fd, n); }
int ftruncate64(int fd, off64_t n) { OF_FD(ftruncate64, fd, n); }
int fallocate(int fd, int how, off_t at, off_t n) { OF_FD(fallocate, fd, how, at, n); }
int fallocate64(int fd, int how, off64_t at, off64_t n) { OF_FD(fallocate64, fd, how, at, n); }

#define FALLOCATE(name, offset)                                  \
  int name(int fd, offset at, offset n) {                        \
    if (due_fd("posix_fallocate", fd, 0)) return error;          \
    return NEXT(name)(fd, at, n);                                \
  }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)

#define OF_PATH(call, path, name, ...)                      \
  if (due(call, path, 0)) FAILS;                            \
  return NEXT(name)(__VA_ARGS__)
int creat(const char* path, mode_t bits) { OF_PATH("open", path, creat, path, bits); }
int mkdir(const char* path, mode_t bits) { OF_PATH("mkdir", path, mkdir, path, bits); }
int mkdirat(int at, const char* path, mode_t bits) { OF_PATH("mkdir", path, mkdirat, at, path, bits); }
int rename(const char* from, const char* to) { OF_PATH("rename", to, rename, from, to); }
int renameat(int a, const char* from, int b, const char* to) { OF_PATH("rename", to, renameat, a, from, b, to); }
int link(const char* from, const char* to) { OF_PATH("link", to, link, from, to); }
int linkat(int a, const char* from, int b, const char* to, int how) {
  OF_PATH("link", to, linkat, a, from, b, to, how);
}
int unlink(const char* path) { OF_PATH("unlink", path, unlink, path); }
int unlinkat(int at, const char* path, int how) { OF_PATH("unlink", path, unlinkat, at, path, how); }
