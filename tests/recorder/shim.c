/* Records what a process does to the files under one directory. Loaded with LD_PRELOAD.
 *
 * RECORDER_DIRECTORY and RECORDER_LOG name the directory and the log, which lies outside of it.
 * Every call is two records, before and after the system call, each with a number from one atomic
 * counter: what ended before something else began really did. Records are written by one raw
 * writev each, in any order; the reader sorts them. What the reader could not replay (a shared
 * mapping, a duplicated descriptor) is recorded as unsupported. Child processes are not recorded.
 * io_uring does not pass through libc and is invisible here. 64-bit Linux only.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FDS_MAX 65536
#define EXPORT __attribute__((visibility("default")))

enum Kind {
  OPEN = 1,
  WRITE,
  TRUNCATE,
  FALLOCATE,
  SYNC,
  RENAME,
  LINK,
  UNLINK,
  MKDIR,
  CLOSE,
  UNSUPPORTED,
};

struct Record { /* then name, path, path2 and data, without ends */
  uint64_t seq, call;
  uint32_t kind, is_end;
  int32_t tid, fd;
  int64_t a, b, result;
  int32_t error;
  uint32_t name_nbytes, path_nbytes, path2_nbytes;
  uint64_t data_nbytes;
};

struct Call {
  uint64_t id;
  int is_recorded;
};

static int is_on;
static int log_fd = -1;
static char directory[PATH_MAX];
static size_t directory_nbytes;
static atomic_ulong next_seq;
static atomic_char is_tracked[FDS_MAX];

static void forget_in_child(void) { is_on = 0; }

__attribute__((constructor)) static void start(void) {
  const char* folder = getenv("RECORDER_DIRECTORY");
  const char* log = getenv("RECORDER_LOG");
  if (folder == NULL || log == NULL || realpath(folder, directory) == NULL) {
    return;
  }
  directory_nbytes = strlen(directory);
  int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
  log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, flags, 0600);
  unsetenv("RECORDER_DIRECTORY");
  unsetenv("LD_PRELOAD");
  pthread_atfork(NULL, NULL, forget_in_child);
  is_on = log_fd >= 0;
}

static int tracks(int fd) { return is_on && fd >= 0 && fd < FDS_MAX && is_tracked[fd]; }

static struct iovec bytes_of(const void* data, size_t nbytes) {
  struct iovec part = {(void*)data, nbytes};
  return part;
}

static void put(struct Record record, const char* name, const char* path, const char* path2,
                const void* data) {
  record.tid = (int32_t)syscall(SYS_gettid);
  record.name_nbytes = (uint32_t)strlen(name);
  record.path_nbytes = (uint32_t)strlen(path);
  record.path2_nbytes = (uint32_t)strlen(path2);
  struct iovec parts[5] = {bytes_of(&record, sizeof record), bytes_of(name, record.name_nbytes),
                           bytes_of(path, record.path_nbytes), bytes_of(path2, record.path2_nbytes),
                           bytes_of(data, record.data_nbytes)};
  size_t total = sizeof record + record.name_nbytes + record.path_nbytes + record.path2_nbytes +
                 record.data_nbytes;
  if (syscall(SYS_writev, log_fd, parts, 5) != (long)total) {
    abort(); /* half a log would be read as a crash */
  }
}

static struct Call begin(int kind, const char* name, int fd, int64_t a, int64_t b, const char* path,
                         const char* path2, const void* data, size_t nbytes) {
  int saved = errno;
  struct Record record = {.kind = (uint32_t)kind, .fd = fd, .a = a, .b = b, .data_nbytes = nbytes};
  record.seq = record.call = atomic_fetch_add(&next_seq, 1);
  put(record, name, path, path2, data);
  errno = saved;
  struct Call call = {record.call, 1};
  return call;
}

static struct Call begin_fd(int kind, const char* name, int fd, int64_t a, int64_t b) {
  struct Call call = {0, 0};
  return tracks(fd) ? begin(kind, name, fd, a, b, "", "", NULL, 0) : call;
}

static long end(struct Call call, long result) {
  int saved = errno;
  if (call.is_recorded) {
    struct Record record = {.call = call.id, .is_end = 1, .result = result};
    record.error = result < 0 ? saved : 0;
    record.seq = atomic_fetch_add(&next_seq, 1);
    put(record, "", "", "", NULL);
  }
  errno = saved;
  return result;
}

/* The path with its folder made real; whether it is the directory or lies under it. */
static int resolve(int at, const char* path, char* out) {
  char joined[PATH_MAX * 2], folder[PATH_MAX], link[64];
  int saved = errno;
  joined[0] = 0;
  if (path[0] != '/' && at == AT_FDCWD) {
    if (getcwd(joined, PATH_MAX) == NULL) {
      joined[0] = 0;
    }
  } else if (path[0] != '/') {
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t found = readlink(link, joined, PATH_MAX - 1);
    joined[found > 0 ? found : 0] = 0;
  }
  if (strlen(joined) + strlen(path) + 2 > sizeof joined) {
    return 0;
  }
  if (joined[0] != 0) {
    strcat(joined, "/");
  }
  strcat(joined, path);
  for (size_t last = strlen(joined); last > 1 && joined[last - 1] == '/';) {
    joined[--last] = 0;
  }
  char* slash = strrchr(joined, '/');
  if (slash == NULL) {
    return 0;
  }
  const char* name = slash + 1;
  *slash = 0;
  int is_found = realpath(joined[0] ? joined : "/", folder) != NULL;
  errno = saved;
  if (!is_found || strlen(folder) + strlen(name) + 2 > PATH_MAX) {
    return 0;
  }
  strcpy(out, folder);
  if (strcmp(name, ".") != 0) {
    strcat(out, "/");
    strcat(out, name);
  }
  const char after = out[directory_nbytes];
  return strncmp(out, directory, directory_nbytes) == 0 && (after == 0 || after == '/');
}

static int open_file(const char* name, int at, const char* path, int flags, mode_t mode) {
  char real[PATH_MAX];
  if (!is_on || !resolve(at, path, real)) {
    int other = (int)syscall(SYS_openat, at, path, flags, mode);
    if (other >= 0 && other < FDS_MAX) {
      is_tracked[other] = 0; /* closed inside libc, and used again */
    }
    return other;
  }
  struct Call call = begin(OPEN, name, -1, flags, mode, real, "", NULL, 0);
  int fd = (int)syscall(SYS_openat, at, path, flags, mode);
  if (fd >= FDS_MAX) {
    abort();
  }
  if (fd >= 0) {
    is_tracked[fd] = 1;
  }
  return (int)end(call, fd);
}

#define MODE_OF(flags, last)                              \
  mode_t mode = 0;                                        \
  if ((flags) & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) { \
    va_list rest;                                         \
    va_start(rest, last);                                 \
    mode = (mode_t)va_arg(rest, int);                     \
    va_end(rest);                                         \
  }

EXPORT int open(const char* path, int flags, ...) {
  MODE_OF(flags, flags)
  return open_file("open", AT_FDCWD, path, flags, mode);
}

EXPORT int open64(const char* path, int flags, ...) {
  MODE_OF(flags, flags)
  return open_file("open", AT_FDCWD, path, flags, mode);
}

EXPORT int openat(int at, const char* path, int flags, ...) {
  MODE_OF(flags, flags)
  return open_file("openat", at, path, flags, mode);
}

EXPORT int openat64(int at, const char* path, int flags, ...) {
  MODE_OF(flags, flags)
  return open_file("openat", at, path, flags, mode);
}

EXPORT int creat(const char* path, mode_t mode) {
  return open_file("creat", AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
}

EXPORT int creat64(const char* path, mode_t mode) { return creat(path, mode); }

EXPORT int close(int fd) {
  struct Call call = begin_fd(CLOSE, "close", fd, 0, 0);
  if (call.is_recorded) {
    is_tracked[fd] = 0; /* before: another thread may be given this number at once */
  }
  return (int)end(call, syscall(SYS_close, fd));
}

/* Data */

EXPORT ssize_t pwrite(int fd, const void* data, size_t nbytes, off_t offset) {
  struct Call call = {0, 0};
  if (tracks(fd)) {
    call = begin(WRITE, "pwrite", fd, offset, (int64_t)nbytes, "", "", data, nbytes);
  }
  return end(call, syscall(SYS_pwrite64, fd, data, nbytes, offset));
}

EXPORT ssize_t pwrite64(int fd, const void* data, size_t nbytes, off_t offset) {
  return pwrite(fd, data, nbytes, offset);
}

static off_t position(int fd) {
  struct stat status;
  if (syscall(SYS_fcntl, fd, F_GETFL) & O_APPEND) {
    return fstat(fd, &status) == 0 ? status.st_size : 0;
  }
  return syscall(SYS_lseek, fd, 0, SEEK_CUR);
}

EXPORT ssize_t write(int fd, const void* data, size_t nbytes) {
  struct Call call = {0, 0};
  if (tracks(fd)) {
    call = begin(WRITE, "write", fd, position(fd), (int64_t)nbytes, "", "", data, nbytes);
  }
  return end(call, syscall(SYS_write, fd, data, nbytes));
}

/* A copy inside the kernel is recorded as a write of what its source holds. */
static struct Call begin_copy(const char* name, int to, off_t to_offset, int from,
                              off_t from_offset, size_t nbytes) {
  struct Call call = {0, 0};
  struct stat status;
  if (!tracks(to) || fstat(from, &status) != 0) {
    return call;
  }
  off_t left = status.st_size > from_offset ? status.st_size - from_offset : 0;
  size_t wanted = nbytes < (size_t)left ? nbytes : (size_t)left;
  char* data = malloc(wanted + 1);
  size_t done = 0;
  long moved = 1;
  while (done < wanted && moved > 0) {
    moved = syscall(SYS_pread64, from, data + done, wanted - done, from_offset + (off_t)done);
    done += moved > 0 ? (size_t)moved : 0;
  }
  call = begin(WRITE, name, to, to_offset, (int64_t)done, "", "", data, done);
  free(data);
  return call;
}

EXPORT ssize_t copy_file_range(int from, off_t* from_offset, int to, off_t* to_offset,
                               size_t nbytes, unsigned flags) {
  struct Call call = {0, 0};
  if (tracks(to)) {
    off_t source = from_offset ? *from_offset : position(from);
    off_t target = to_offset ? *to_offset : position(to);
    call = begin_copy("copy_file_range", to, target, from, source, nbytes);
  }
  return end(call, syscall(SYS_copy_file_range, from, from_offset, to, to_offset, nbytes, flags));
}

EXPORT ssize_t sendfile(int to, int from, off_t* from_offset, size_t nbytes) {
  struct Call call = {0, 0};
  if (tracks(to)) {
    off_t source = from_offset ? *from_offset : position(from);
    call = begin_copy("sendfile", to, position(to), from, source, nbytes);
  }
  return end(call, syscall(SYS_sendfile, to, from, from_offset, nbytes));
}

EXPORT ssize_t sendfile64(int to, int from, off_t* from_offset, size_t nbytes) {
  return sendfile(to, from, from_offset, nbytes);
}

EXPORT int ioctl(int fd, unsigned long request, ...) {
  va_list rest;
  va_start(rest, request);
  void* argument = va_arg(rest, void*);
  va_end(rest);
  struct Call call = {0, 0};
  if (tracks(fd) && request == FICLONE) {
    call = begin_copy("ficlone", fd, 0, (int)(intptr_t)argument, 0, SIZE_MAX);
  } else if (tracks(fd) && request == FICLONERANGE) {
    const struct file_clone_range* range = argument;
    size_t nbytes = range->src_length ? range->src_length : SIZE_MAX;
    call = begin_copy("ficlonerange", fd, (off_t)range->dest_offset, (int)range->src_fd,
                      (off_t)range->src_offset, nbytes);
  }
  return (int)end(call, syscall(SYS_ioctl, fd, request, argument));
}

/* Sizes and syncs */

EXPORT int ftruncate(int fd, off_t nbytes) {
  struct Call call = begin_fd(TRUNCATE, "ftruncate", fd, nbytes, 0);
  return (int)end(call, syscall(SYS_ftruncate, fd, nbytes));
}

EXPORT int ftruncate64(int fd, off_t nbytes) { return ftruncate(fd, nbytes); }

EXPORT int fallocate(int fd, int mode, off_t offset, off_t nbytes) {
  int kind = mode & ~FALLOC_FL_KEEP_SIZE ? UNSUPPORTED : FALLOCATE;
  int64_t end_at = mode & FALLOC_FL_KEEP_SIZE ? 0 : offset + nbytes;
  struct Call call = begin_fd(kind, "fallocate", fd, end_at, 0);
  return (int)end(call, syscall(SYS_fallocate, fd, mode, offset, nbytes));
}

EXPORT int fallocate64(int fd, int mode, off_t offset, off_t nbytes) {
  return fallocate(fd, mode, offset, nbytes);
}

EXPORT int posix_fallocate(int fd, off_t offset, off_t nbytes) {
  int (*next)(int, off_t, off_t) = (int (*)(int, off_t, off_t))dlsym(RTLD_NEXT, "posix_fallocate");
  struct Call call = begin_fd(FALLOCATE, "posix_fallocate", fd, offset + nbytes, 0);
  int error = next(fd, offset, nbytes); /* returns the error instead of setting it */
  end(call, error ? -1 : 0);
  return error;
}

EXPORT int posix_fallocate64(int fd, off_t offset, off_t nbytes) {
  return posix_fallocate(fd, offset, nbytes);
}

EXPORT int fsync(int fd) {
  struct Call call = begin_fd(SYNC, "fsync", fd, 0, 0);
  return (int)end(call, syscall(SYS_fsync, fd));
}

EXPORT int fdatasync(int fd) {
  struct Call call = begin_fd(SYNC, "fdatasync", fd, 0, 0);
  return (int)end(call, syscall(SYS_fdatasync, fd));
}

/* Names */

static int move_name(const char* name, int kind, long number, int from_at, const char* from,
                     int to_at, const char* to, unsigned flags) {
  char source[PATH_MAX], target[PATH_MAX];
  struct Call call = {0, 0};
  if (is_on) {
    int is_source_in = resolve(from_at, from, source);
    int is_target_in = resolve(to_at, to, target);
    if (is_source_in || is_target_in) {
      int is_known = is_source_in && is_target_in && (flags & ~(unsigned)RENAME_NOREPLACE) == 0;
      call = begin(is_known ? kind : UNSUPPORTED, name, -1, flags, 0, source, target, NULL, 0);
    }
  }
  return (int)end(call, syscall(number, from_at, from, to_at, to, flags));
}

EXPORT int rename(const char* from, const char* to) {
  return move_name("rename", RENAME, SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

EXPORT int renameat(int from_at, const char* from, int to_at, const char* to) {
  return move_name("renameat", RENAME, SYS_renameat2, from_at, from, to_at, to, 0);
}

EXPORT int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
  return move_name("renameat2", RENAME, SYS_renameat2, from_at, from, to_at, to, flags);
}

EXPORT int link(const char* from, const char* to) {
  return move_name("link", LINK, SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}

EXPORT int linkat(int from_at, const char* from, int to_at, const char* to, int flags) {
  return move_name("linkat", LINK, SYS_linkat, from_at, from, to_at, to, (unsigned)flags);
}

static int change_name(const char* name, int kind, int at, const char* path, long number,
                       long argument) {
  char real[PATH_MAX];
  struct Call call = {0, 0};
  if (is_on && resolve(at, path, real)) {
    call = begin(kind, name, -1, argument, 0, real, "", NULL, 0);
  }
  return (int)end(call, syscall(number, at, path, argument));
}

EXPORT int unlink(const char* path) {
  return change_name("unlink", UNLINK, AT_FDCWD, path, SYS_unlinkat, 0);
}

EXPORT int unlinkat(int at, const char* path, int flags) {
  return change_name("unlinkat", UNLINK, at, path, SYS_unlinkat, flags);
}

EXPORT int rmdir(const char* path) {
  return change_name("rmdir", UNLINK, AT_FDCWD, path, SYS_unlinkat, AT_REMOVEDIR);
}

EXPORT int mkdir(const char* path, mode_t mode) {
  return change_name("mkdir", MKDIR, AT_FDCWD, path, SYS_mkdirat, (long)mode);
}

EXPORT int mkdirat(int at, const char* path, mode_t mode) {
  return change_name("mkdirat", MKDIR, at, path, SYS_mkdirat, (long)mode);
}

/* What could not be replayed */

static void refuse(const char* name, int fd) {
  struct stat status;
  if (fstat(fd, &status) == 0 && !S_ISDIR(status.st_mode)) { /* a listing duplicates its folder */
    end(begin_fd(UNSUPPORTED, name, fd, 0, 0), 0);
  }
}

EXPORT ssize_t writev(int fd, const struct iovec* parts, int num_parts) {
  refuse("writev", fd);
  return syscall(SYS_writev, fd, parts, num_parts);
}

EXPORT ssize_t pwritev(int fd, const struct iovec* parts, int num_parts, off_t offset) {
  refuse("pwritev", fd);
  return syscall(SYS_pwritev, fd, parts, num_parts, offset, 0);
}

EXPORT ssize_t pwritev64(int fd, const struct iovec* parts, int num_parts, off_t offset) {
  return pwritev(fd, parts, num_parts, offset);
}

EXPORT int dup(int fd) {
  refuse("dup", fd);
  return (int)syscall(SYS_dup, fd);
}

EXPORT int fcntl64(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  void* argument = va_arg(rest, void*);
  va_end(rest);
  if (command == F_DUPFD || command == F_DUPFD_CLOEXEC) {
    refuse("fcntl(F_DUPFD)", fd);
  }
  return (int)syscall(SYS_fcntl, fd, command, argument);
}

EXPORT int fcntl(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  void* argument = va_arg(rest, void*);
  va_end(rest);
  return fcntl64(fd, command, argument);
}

EXPORT void* mmap(void* hint, size_t nbytes, int protection, int flags, int fd, off_t offset) {
  if ((flags & MAP_TYPE) != MAP_PRIVATE && protection & PROT_WRITE) {
    refuse("mmap", fd);
  }
  return (void*)syscall(SYS_mmap, hint, nbytes, protection, flags, fd, offset);
}

EXPORT void* mmap64(void* hint, size_t nbytes, int protection, int flags, int fd, off_t offset) {
  return mmap(hint, nbytes, protection, flags, fd, offset);
}
