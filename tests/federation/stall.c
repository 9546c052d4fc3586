/* Preloaded into the processes of a run: calls on files below a folder take long.

   STALL_FOLDER: below it every call takes STALL_MS, and where the path contains one of STALL_SLOW
   (separated by ':') a rename, and a write of a .jsonl, takes 5 seconds. Each of the long ones adds
   a byte to STALL_COUNT. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void pause_ms(long ms) {
  struct timespec left = {ms / 1000, ms % 1000 * 1000000};
  while (nanosleep(&left, &left)) {
  }
}

static void stall(const char *path, int may_be_long) {
  const char *folder = getenv("STALL_FOLDER"), *ms = getenv("STALL_MS");
  if (!folder || !path || strncmp(path, folder, strlen(folder))) return;
  char slow[1024] = "", *state;
  strncat(slow, getenv("STALL_SLOW") ? getenv("STALL_SLOW") : "", sizeof slow - 1);
  for (char *word = strtok_r(slow, ":", &state); may_be_long && word;
       word = strtok_r(NULL, ":", &state)) {
    if (!strstr(path, word)) continue;
    pause_ms(5000);
    int fd = (int)syscall(257, AT_FDCWD, getenv("STALL_COUNT"), O_WRONLY | O_CREAT | O_APPEND, 0644);
    syscall(1, fd, ".", 1);
    syscall(3, fd);
    return;
  }
  pause_ms(ms ? atol(ms) : 0);
}

static void stall_fd(int fd, int may_be_long) {
  char name[64], path[4096];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  long length = syscall(89, name, path, sizeof path - 1);
  if (length <= 0 || path[0] != '/') return;
  path[length] = 0;
  stall(path, may_be_long && strstr(path, ".jsonl"));
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                    \
  int name(const char *path, int flags, ...) {        \
    va_list more;                                     \
    va_start(more, flags);                            \
    int mode = va_arg(more, int);                     \
    va_end(more);                                     \
    stall(path, 0);                                   \
    return NEXT(name)(path, flags, mode);             \
  }
OPEN(open)
OPEN(open64)

#define STAT(name, type)                              \
  int name(const char *path, struct type *found) {    \
    stall(path, 0);                                   \
    return NEXT(name)(path, found);                   \
  }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

ssize_t write(int fd, const void *data, size_t size) {
  stall_fd(fd, 1);
  return NEXT(write)(fd, data, size);
}

int fsync(int fd) {
  stall_fd(fd, 0);
  return NEXT(fsync)(fd);
}

int rename(const char *from, const char *to) {
  stall(to, 1);
  return NEXT(rename)(from, to);
}

int unlink(const char *path) {
  stall(path, 0);
  return NEXT(unlink)(path);
}

void *opendir_(const char *) __asm__("opendir");
void *opendir_(const char *path) {
  stall(path, 0);
  return ((void *(*)(const char *))dlsym(RTLD_NEXT, "opendir"))(path);
}
