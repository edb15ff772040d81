/* Stands between a process and the C library where it changes files below one folder.
 *
 * Loaded by LD_PRELOAD. Quiet until `faults_arm` is called: from then on the calls below the folder
 * are numbered, written to a log, and the one with a given number is broken:
 *   - the process is killed by SIGKILL before it, or after half of its bytes are written;
 *   - or it fails with an errno, and after it all calls of the kinds in a mask (a disk stays full).
 * The model is SQLite's test VFS, which fails the n-th I/O call for every n, and ALICE (Pillai and
 * others, OSDI 2014), which found that applications differ in what they hold true of each call.
 * What is not seen: calls that the C library makes inside of itself (fwrite, closedir), stores into
 * mapped memory (the mapping alone is a call), and what is written to files without a name.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/ucontext.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READ, CREATE, WRITE, SYNC, RENAME, MKDIR, REMOVE, TRUNCATE, LOCK, MAP, LINK };
static const char *const NAMES[] = {"read",   "create", "write",    "sync", "rename", "mkdir",
                                    "remove", "truncate", "lock",     "map",  "link"};
enum { COUNT, KILL, TEAR, FAIL };

static struct {
    char root[PATH_MAX];
    size_t length;
    long at;
    int action, error, log;
    unsigned after; /* kinds that go on failing */
    atomic_long calls;
} state = {.log = -1};

/* Take `.` and `..` and doubled slashes out of an absolute path, in place. */
static void normalize(char *path) {
    char *out = path;
    for (char *in = path; *in;) {
        while (*in == '/') in++;
        size_t part = strcspn(in, "/");
        if (part == 2 && !strncmp(in, "..", 2)) {
            while (out > path && *--out != '/') {
            }
        } else if (part && !(part == 1 && *in == '.')) {
            *out++ = '/';
            memmove(out, in, part);
            out += part;
        }
        in += part;
    }
    *out = 0;
}

static int below(const char *path) {
    return !strncmp(path, state.root, state.length) &&
           (path[state.length] == '/' || !path[state.length]);
}

static int link_of(int descriptor, char *path) {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t got = syscall(SYS_readlinkat, AT_FDCWD, name, path, PATH_MAX - 1);
    path[got < 0 ? 0 : got] = 0;
    return got > 0;
}

/* Whether a path, of a folder that is open or of the working folder, is watched; sets the whole. */
static int watched_at(int folder, const char *path, char *whole) {
    if (!state.length || !path) return 0;
    int known = errno;
    whole[0] = 0;
    if (path[0] != '/') {
        if (folder != AT_FDCWD ? !link_of(folder, whole) : !getcwd(whole, PATH_MAX)) return 0;
    }
    size_t used = strlen(whole);
    snprintf(whole + used, PATH_MAX - used, "/%s", path);
    normalize(whole);
    errno = known;
    return below(whole);
}

/* Whether a file never had a name: nobody finds it again. How often one is written to, as by a probe
 * of the disk, depends on the time, and would move the numbers of all calls behind it. */
static int nameless(const char *path) {
    const char *name = strrchr(path, '/'), *end = strstr(path, " (deleted)");
    return name && name[1] == '#' && end && end > name;
}

static int watched(int descriptor, char *whole) {
    if (!state.length || descriptor < 0) return 0;
    int known = errno;
    int found = link_of(descriptor, whole) && below(whole) && !nameless(whole);
    errno = known;
    return found;
}

static void note(long number, int kind, const char *path, const char *other, size_t bytes) {
    char line[2 * PATH_MAX + 100];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%zu\t%s\t%s\n", number, NAMES[kind], bytes,
                          path, other ? other : "");
    syscall(SYS_write, state.log, line, length);
}

/* Number a call; 0: make it. 1: it fails, with errno set. 2: half of it, then `die`. */
static int struck(int kind, const char *path, const char *other, size_t bytes) {
    int known = errno;
    long number = atomic_fetch_add(&state.calls, 1) + 1;
    note(number, kind, path, other, bytes);
    errno = known;
    if (number == state.at && state.action == KILL) kill(getpid(), SIGKILL);
    if (number == state.at && state.action == TEAR) return 2;
    int goes_on = number > state.at && state.after >> kind & 1;
    if (state.action != FAIL || !state.at || !(number == state.at || goes_on)) return 0;
    errno = state.error;
    return 1;
}

static void die(void) { kill(getpid(), SIGKILL); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WHOLE char whole[PATH_MAX]

static int opening(int flags) {
    return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) ? CREATE : READ;
}

#define OPEN(name)                                                           \
    int name(const char *path, int flags, ...) {                             \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t mode = va_arg(rest, mode_t);                                  \
        va_end(rest);                                                        \
        WHOLE;                                                               \
        if (watched_at(AT_FDCWD, path, whole)) {                             \
            int how = struck(opening(flags), whole, NULL, 0);                \
            if (how == 1) return -1;                                         \
            if (how) die();                                                  \
        }                                                                    \
        return REAL(name)(path, flags, mode);                                \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                         \
    int name(int folder, const char *path, int flags, ...) {                 \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t mode = va_arg(rest, mode_t);                                  \
        va_end(rest);                                                        \
        WHOLE;                                                               \
        if (watched_at(folder, path, whole)) {                               \
            int how = struck(opening(flags), whole, NULL, 0);                \
            if (how == 1) return -1;                                         \
            if (how) die();                                                  \
        }                                                                    \
        return REAL(name)(folder, path, flags, mode);                        \
    }
OPENAT(openat)
OPENAT(openat64)

/* A call that names one path, or two: what it returns when it fails. */
#define ON_PATH(kind, folder, path, failed)                                  \
    WHOLE;                                                                   \
    if (watched_at(folder, path, whole)) {                                   \
        int how = struck(kind, whole, NULL, 0);                              \
        if (how == 1) return failed;                                         \
        if (how) die();                                                      \
    }
#define ON_TWO(kind, folder, path, other_folder, other_path)                 \
    char whole[PATH_MAX], other[PATH_MAX];                                   \
    int first = watched_at(folder, path, whole);                             \
    int second = watched_at(other_folder, other_path, other);                \
    if (first || second) {                                                   \
        int how = struck(kind, whole, other, 0);                             \
        if (how == 1) return -1;                                             \
        if (how) die();                                                      \
    }
#define ON_FILE(kind, descriptor, bytes, failed, half)                       \
    WHOLE;                                                                   \
    if (watched(descriptor, whole)) {                                        \
        int how = struck(kind, whole, NULL, bytes);                          \
        if (how == 1) return failed;                                         \
        if (how) {                                                           \
            half;                                                            \
            die();                                                           \
        }                                                                    \
    }

int creat(const char *path, mode_t mode) {
    ON_PATH(CREATE, AT_FDCWD, path, -1)
    return REAL(creat)(path, mode);
}
FILE *fopen(const char *path, const char *mode) {
    ON_PATH(strpbrk(mode, "wa+") ? CREATE : READ, AT_FDCWD, path, NULL)
    return REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    ON_PATH(strpbrk(mode, "wa+") ? CREATE : READ, AT_FDCWD, path, NULL)
    return REAL(fopen64)(path, mode);
}
DIR *opendir(const char *path) {
    ON_PATH(READ, AT_FDCWD, path, NULL)
    return REAL(opendir)(path);
}
int mkdir(const char *path, mode_t mode) {
    ON_PATH(MKDIR, AT_FDCWD, path, -1)
    return REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    ON_PATH(MKDIR, folder, path, -1)
    return REAL(mkdirat)(folder, path, mode);
}
int unlink(const char *path) {
    ON_PATH(REMOVE, AT_FDCWD, path, -1)
    return REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    ON_PATH(REMOVE, folder, path, -1)
    return REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    ON_PATH(REMOVE, AT_FDCWD, path, -1)
    return REAL(rmdir)(path);
}
int remove(const char *path) {
    ON_PATH(REMOVE, AT_FDCWD, path, -1)
    return REAL(remove)(path);
}
int truncate(const char *path, off_t length) {
    ON_PATH(TRUNCATE, AT_FDCWD, path, -1)
    return REAL(truncate)(path, length);
}
int rename(const char *from, const char *to) {
    ON_TWO(RENAME, AT_FDCWD, from, AT_FDCWD, to)
    return REAL(rename)(from, to);
}
int renameat(int from, const char *path, int to, const char *target) {
    ON_TWO(RENAME, from, path, to, target)
    return syscall(SYS_renameat2, from, path, to, target, 0);
}
int renameat2(int from, const char *path, int to, const char *target, unsigned flags) {
    ON_TWO(RENAME, from, path, to, target)
    return syscall(SYS_renameat2, from, path, to, target, flags);
}
int link(const char *path, const char *target) {
    ON_TWO(LINK, AT_FDCWD, path, AT_FDCWD, target)
    return REAL(link)(path, target);
}
int linkat(int from, const char *path, int to, const char *target, int flags) {
    ON_TWO(LINK, from, path, to, target)
    return REAL(linkat)(from, path, to, target, flags);
}
int symlink(const char *text, const char *target) {
    ON_PATH(LINK, AT_FDCWD, target, -1)
    return REAL(symlink)(text, target);
}
int symlinkat(const char *text, int folder, const char *target) {
    ON_PATH(LINK, folder, target, -1)
    return REAL(symlinkat)(text, folder, target);
}

ssize_t write(int to, const void *bytes, size_t count) {
    ON_FILE(WRITE, to, count, -1, (void)!REAL(write)(to, bytes, count / 2))
    return REAL(write)(to, bytes, count);
}
#define PWRITE(name, offset_type)                                            \
    ssize_t name(int to, const void *bytes, size_t count, offset_type at) {  \
        ON_FILE(WRITE, to, count, -1, (void)!REAL(name)(to, bytes, count / 2, at)) \
        return REAL(name)(to, bytes, count, at);                             \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

static size_t bytes_of(const struct iovec *parts, int count) {
    size_t bytes = 0;
    for (int part = 0; part < count; part++) bytes += parts[part].iov_len;
    return bytes;
}
/* The first parts up to the half, each whole but for the last. */
static int cut(const struct iovec *parts, int count, struct iovec *out) {
    size_t left = bytes_of(parts, count) / 2;
    int used = 0;
    for (; used < count && used < 16 && left; used++) {
        out[used] = parts[used];
        if (out[used].iov_len > left) out[used].iov_len = left;
        left -= out[used].iov_len;
    }
    return used;
}
ssize_t writev(int to, const struct iovec *parts, int count) {
    struct iovec some[16];
    ON_FILE(WRITE, to, bytes_of(parts, count), -1,
            (void)!REAL(writev)(to, some, cut(parts, count, some)))
    return REAL(writev)(to, parts, count);
}
#define PWRITEV(name, offset_type)                                           \
    ssize_t name(int to, const struct iovec *parts, int count, offset_type at) { \
        struct iovec some[16];                                               \
        ON_FILE(WRITE, to, bytes_of(parts, count), -1,                       \
                (void)!REAL(name)(to, some, cut(parts, count, some), at))    \
        return REAL(name)(to, parts, count, at);                             \
    }
PWRITEV(pwritev, off_t)
PWRITEV(pwritev64, off64_t)

ssize_t sendfile(int to, int from, off_t *at, size_t count) {
    ON_FILE(WRITE, to, count, -1, (void)!REAL(sendfile)(to, from, at, 1))
    return REAL(sendfile)(to, from, at, count);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t count) {
    ON_FILE(WRITE, to, count, -1, (void)!REAL(sendfile64)(to, from, at, 1))
    return REAL(sendfile64)(to, from, at, count);
}
ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *at, size_t count,
                        unsigned flags) {
    ON_FILE(WRITE, to, count, -1, (void)!REAL(copy_file_range)(from, from_at, to, at, 1, flags))
    return REAL(copy_file_range)(from, from_at, to, at, count, flags);
}
int fsync(int file) {
    ON_FILE(SYNC, file, 0, -1, )
    return REAL(fsync)(file);
}
int fdatasync(int file) {
    ON_FILE(SYNC, file, 0, -1, )
    return REAL(fdatasync)(file);
}
#define FTRUNCATE(name, offset_type)                                         \
    int name(int file, offset_type length) {                                 \
        ON_FILE(TRUNCATE, file, 0, -1, )                                     \
        return REAL(name)(file, length);                                     \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)
#define FALLOCATE(name, offset_type)                                         \
    int name(int file, offset_type from, offset_type length) {               \
        ON_FILE(TRUNCATE, file, 0, errno, )                                  \
        return REAL(name)(file, from, length);                               \
    }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)
int flock(int file, int how_to) {
    ON_FILE(LOCK, file, 0, -1, )
    return REAL(flock)(file, how_to);
}

/* Of mappings those alone by which a file changes. */
#define MMAP(name, offset_type)                                              \
    void *name(void *where, size_t length, int protection, int flags, int file, offset_type at) { \
        WHOLE;                                                               \
        int shared = (flags & MAP_TYPE) != MAP_PRIVATE && protection & PROT_WRITE; \
        if (shared && !(flags & MAP_ANONYMOUS) && watched(file, whole)) {    \
            int how = struck(MAP, whole, NULL, length);                      \
            if (how == 1) return MAP_FAILED;                                 \
            if (how) die();                                                  \
        }                                                                    \
        return (void *)syscall(SYS_mmap, where, length, protection, flags, file, at); \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

#if defined(__x86_64__)
/* Rust's rustix, by which safetensors gives its file a name, makes system calls without the C
 * library. A filter sends renameat here as SIGSYS; it is made as renameat2, which has no filter
 * (and not by glibc, whose renameat2 without flags is renameat). */
static void trapped(int signal_number, siginfo_t *info, void *context) {
    (void)signal_number, (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    int known = errno;
    int done = renameat2(registers[REG_RDI], (const char *)registers[REG_RSI], registers[REG_RDX],
                         (const char *)registers[REG_R10], 0);
    registers[REG_RAX] = done < 0 ? -errno : done;
    errno = known;
}

static int trap_renameat(void) {
    struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return 0;
    return !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
#else
/* Elsewhere glibc itself makes renameat, or there is nobody to say what its registers are. */
static int trap_renameat(void) { return 0; }
#endif

/* Begin; returns whether system calls past the C library are heard too. */
int faults_arm(const char *root, long at, int action, int error, unsigned after, int log) {
    snprintf(state.root, sizeof state.root, "%s", root);
    state.at = at;
    state.action = action;
    state.error = error;
    state.after = after;
    state.log = log;
    atomic_store(&state.calls, 0);
    state.length = strlen(state.root);
    return trap_renameat();
}
