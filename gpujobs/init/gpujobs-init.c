/*
 * gpujobs-init: the first program of every container that gpujobs starts.
 *
 *   gpujobs-init [--dir DIR] run  PROGRAM [ARGUMENT...]    check who we are, wait at the gate, run as PID 1
 *   gpujobs-init [--dir DIR] exec PROGRAM [ARGUMENT...]    check who we are, become the program
 *   gpujobs-init probe [--dir DIR] [--join FILE]... MAJOR:MINOR[-MINOR]...
 *   gpujobs-init --version
 *
 * The server mounts a directory read-only at /.gpujobs; it holds this binary, `job` (the control file), `gate` (a
 * FIFO on which the server releases the job once it has checked the devices granted) and, where the job has
 * secrets, `secrets`, which the job's user alone can read.
 * --dir stands before the mode, which the server writes: whatever a user's command looks like, it cannot
 * name another directory. Nothing is taken from the environment either, because the image sets that.
 *
 * Control file: records "key=value", each ended by a NUL: uid=N gid=N groups=N,N,... caps=HEX keep=HEX nogate=1
 * filegate=1 secrets=1, and any number of env=NAME=VALUE (set) and env=NAME (remove). keep= are the capabilities that the
 * program is to have (ambient, so that they outlive the change of uid and the exec); without it, it has none.
 *
 * With filegate=1 the gate is a file `word` that appears: gVisor lets nothing in a container open a FIFO of the host.
 *
 * Secrets: for each its file's name, its variable's (or nothing) and its length in digits, each ended by a NUL, then
 * its bytes and a NUL. With secrets=1, `run` writes them to /run/secrets, which has to be a file system in memory of
 * the job's user alone, and both `run` and `exec` set the variables.
 *
 * The binary is static: nothing of an image (loader, libc, NSS, /etc/passwd) takes part in the check.
 * Exit codes: 125 refused by this program (as `docker run` has it), 126 and 127 as shells have them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define VERSION "gpujobs-init 1"
#define CONTROL_DIR "/.gpujobs"
#define CONTROL_MAX (1 << 20)  /* bytes; an environment larger than this would not pass execve anyway */
#define SECRETS_DIR "/run/secrets"
#define SECRETS_MAX ((1 << 20) + (1 << 16))  /* bytes: the server's limit of all of them, and room for names */
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  /* the Engine's own */
#define FILEGATE_NS 20000000L  /* between looks: a start takes half a second under gVisor anyway */
#define ID_MAX 0xfffffffeu     /* (uid_t)-1 means "leave unchanged" to setresuid: never an identity */
#define DEVICES_MAX 4096       /* of one probe */
#define MAJOR_MAX 0xfffu       /* the kernel's dev_t has 12 bits of major, 20 of minor */
#define MINOR_MAX 0xfffffu

enum { EXIT_REFUSED = 125, EXIT_NOT_EXECUTABLE = 126, EXIT_NOT_FOUND = 127 };

struct identity {
    uid_t uid;
    gid_t gid;
    gid_t groups[NGROUPS_MAX];
    size_t ngroups;
    uint64_t caps; /* what the bounding set may still hold */
    uint64_t keep; /* what the program has: all of it, and nothing else */
    bool nogate;
    bool filegate;
    bool secrets;
};

/* Static, not on the heap: sizes are bounded, and putenv() keeps pointers into `control`. */
static char control[CONTROL_MAX + 1];
static size_t control_size;
static char secrets[SECRETS_MAX + 1];
static size_t secrets_size;
static struct identity expected;
static gid_t actual_groups[NGROUPS_MAX];

/* ---- words ------------------------------------------------------------------------------------------- */

/* One write, so that a line is not torn by another process that shares stderr. */
__attribute__((format(printf, 1, 2))) static void complain(const char *format, ...)
{
    char line[2048] = "gpujobs-init: ";
    const size_t prefix = strlen(line);
    va_list arguments;

    va_start(arguments, format);
    int n = vsnprintf(line + prefix, sizeof line - prefix - 1, format, arguments);
    va_end(arguments);
    size_t length = strlen(line);
    (void)n;
    line[length++] = '\n';
    for (size_t done = 0; done < length;) {
        ssize_t written = write(STDERR_FILENO, line + done, length - done);
        if (written < 0 && errno != EINTR)
            return; /* nobody to tell */
        if (written > 0)
            done += (size_t)written;
    }
}

#define refuse(...) do { complain(__VA_ARGS__); exit(EXIT_REFUSED); } while (0)

/* A number of plain digits up to `max`; NULL when there is none, else what follows it. No sign, no space, no
 * prefix, no overflow: strtoul accepts all four. */
static const char *parse_number(const char *text, unsigned base, uint64_t max, uint64_t *number)
{
    const char *p = text;

    for (*number = 0;; p++) {
        unsigned digit;
        if (*p >= '0' && *p <= '9')
            digit = (unsigned)(*p - '0');
        else if (base == 16 && *p >= 'a' && *p <= 'f')
            digit = (unsigned)(*p - 'a') + 10;
        else
            break;
        if (digit > max || *number > (max - digit) / base)
            return NULL;
        *number = *number * base + digit;
    }
    return p == text ? NULL : p;
}

/* ---- the control file -------------------------------------------------------------------------------- */

static int open_control(const char *dir, const char *name, int flags)
{
    char path[PATH_MAX];
    int fd;

    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        refuse("%s: the path is too long", dir);
    do
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | flags);
    while (fd < 0 && errno == EINTR);
    if (fd < 0)
        refuse("%s: %s", path, strerror(errno));
    return fd;
}

/* A regular file of the control directory, whole, into a buffer of max + 1 bytes; its last byte has to be a NUL. */
static size_t read_whole(const char *dir, const char *name, char *buffer, size_t max)
{
    /* O_NONBLOCK: a FIFO planted under the name must be refused, not waited for. */
    int fd = open_control(dir, name, O_NONBLOCK);
    struct stat status;
    size_t size = 0;

    if (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode))
        refuse("%s/%s is not a regular file", dir, name);
    for (;;) {
        ssize_t n = read(fd, buffer + size, max + 1 - size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            refuse("%s/%s: %s", dir, name, strerror(errno));
        if (n == 0)
            break;
        size += (size_t)n;
        if (size > max)
            refuse("%s/%s is larger than %zu bytes", dir, name, max);
    }
    close(fd);
    if (size == 0 || buffer[size - 1] != '\0')
        refuse("%s/%s is cut off: its last record has no end", dir, name);
    return size;
}

static int by_number(const void *left, const void *right)
{
    gid_t a = *(const gid_t *)left, b = *(const gid_t *)right;
    return a < b ? -1 : a > b;
}

/* Sort, and drop duplicates and the primary group: engines differ in whether they list it, it adds no right. */
static size_t normalise_groups(gid_t *groups, size_t count, gid_t primary)
{
    size_t kept = 0;

    qsort(groups, count, sizeof *groups, by_number);
    for (size_t i = 0; i < count; i++)
        if (groups[i] != primary && (kept == 0 || groups[kept - 1] != groups[i]))
            groups[kept++] = groups[i];
    return kept;
}

static void parse_groups(const char *text)
{
    uint64_t number;

    for (const char *p = text; *p != '\0';) {
        const char *end = parse_number(p, 10, ID_MAX, &number);
        if (end == NULL || (*end != ',' && *end != '\0') || (*end == ',' && end[1] == '\0'))
            refuse("control file: groups=%.200s is not a list of group numbers", text);
        if (expected.ngroups == NGROUPS_MAX)
            refuse("control file: more than %d groups", NGROUPS_MAX);
        expected.groups[expected.ngroups++] = (gid_t)number;
        p = *end == ',' ? end + 1 : end;
    }
}

static uint64_t parse_value(const char *key, const char *text, unsigned base, uint64_t max)
{
    uint64_t number;
    const char *end = parse_number(text, base, max, &number);

    if (end == NULL || *end != '\0')
        refuse("control file: %s=%.200s is not a number in range", key, text);
    return number;
}

static void parse_control(void)
{
    enum { UID = 1, GID = 2, GROUPS = 4, CAPS = 8, NOGATE = 16, KEEP = 32, SECRETS = 64, FILEGATE = 128 };
    unsigned seen = 0, key;

    for (char *record = control; record < control + control_size; record += strlen(record) + 1) {
        char *value = strchr(record, '=');
        if (value == NULL)
            refuse("control file: the record \"%.200s\" has no '='", record);
        const size_t length = (size_t)(value++ - record);
#define IS(name) (length == sizeof(name) - 1 && memcmp(record, name, length) == 0)
        if (IS("env")) {
            if (*value == '\0' || *value == '=')
                refuse("control file: an environment variable without a name");
            continue;
        } else if (IS("uid")) {
            key = UID, expected.uid = (uid_t)parse_value("uid", value, 10, ID_MAX);
        } else if (IS("gid")) {
            key = GID, expected.gid = (gid_t)parse_value("gid", value, 10, ID_MAX);
        } else if (IS("groups")) {
            key = GROUPS;
            if (!(seen & GROUPS))
                parse_groups(value);
        } else if (IS("caps")) {
            key = CAPS, expected.caps = parse_value("caps", value, 16, UINT64_MAX);
        } else if (IS("keep")) {
            key = KEEP, expected.keep = parse_value("keep", value, 16, UINT64_MAX);
        } else if (IS("nogate")) {
            key = NOGATE, expected.nogate = parse_value("nogate", value, 10, 1) != 0;
        } else if (IS("filegate")) {
            key = FILEGATE, expected.filegate = parse_value("filegate", value, 10, 1) != 0;
        } else if (IS("secrets")) {
            key = SECRETS, expected.secrets = parse_value("secrets", value, 10, 1) != 0;
        } else {
            refuse("control file: unknown record \"%.200s\"", record);
        }
#undef IS
        if (seen & key)
            refuse("control file: %.*s is given twice", (int)length, record);
        seen |= key;
    }
    if ((seen & (UID | GID | GROUPS)) != (UID | GID | GROUPS))
        refuse("control file: uid, gid and groups must all be given");
    if (expected.uid == 0)
        refuse("uid: a job never runs as uid 0");
    if ((expected.keep & ~expected.caps) != 0)
        refuse("control file: keep= is not within caps=");
    expected.ngroups = normalise_groups(expected.groups, expected.ngroups, expected.gid);
}

static void apply_environment(void)
{
    for (char *record = control; record < control + control_size;) {
        char *next = record + strlen(record) + 1;
        if (strncmp(record, "env=", 4) == 0) {
            char *variable = record + 4, *equals = strchr(variable, '=');
            if (equals != NULL)
                *equals = '\0';
            unsetenv(variable); /* all of it: an environment may hold a name twice, and putenv changes one */
            if (equals != NULL) {
                *equals = '=';
                if (putenv(variable) != 0)
                    refuse("environment: %s", strerror(errno));
            }
        }
        record = next;
    }
}

/* ---- identity ---------------------------------------------------------------------------------------- */

static void read_capabilities(struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3])
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};

    /* The system call, not /proc/self/status: what is mounted on /proc is not ours to trust. */
    if (syscall(SYS_capget, &header, data) != 0)
        refuse("capget: %s", strerror(errno));
}

static uint64_t join_words(uint32_t low, uint32_t high)
{
    return (uint64_t)high << 32 | low;
}

/* Become the expected identity, where we have the right to: an exec started as root ends up as the user too. */
static void take_identity(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3], kept[_LINUX_CAPABILITY_U32S_3];
    const uint32_t needed = 1u << CAP_SETUID | 1u << CAP_SETGID;

    read_capabilities(data);
    if ((data[0].effective & needed) != needed)
        return;
    /* Groups while we may; the bounding set before the uid, whose change takes CAP_SETPCAP away. A bounding set
     * that will not shrink is found by the check. */
    if (setgroups(expected.ngroups, expected.groups) != 0)
        refuse("setgroups: %s", strerror(errno));
    if (setresgid(expected.gid, expected.gid, expected.gid) != 0)
        refuse("setresgid %u: %s", expected.gid, strerror(errno));
    for (unsigned cap = 0; cap < 64 && prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
        if (!(expected.caps >> cap & 1))
            prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
    if (expected.keep != 0 && prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) != 0)
        refuse("keep capabilities: %s", strerror(errno));
    if (setresuid(expected.uid, expected.uid, expected.uid) != 0)
        refuse("setresuid %u: %s", expected.uid, strerror(errno));
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    for (size_t i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
        const uint32_t part = (uint32_t)(expected.keep >> (32 * i));
        kept[i] = (struct __user_cap_data_struct){.effective = part, .permitted = part, .inheritable = part};
    }
    if (syscall(SYS_capset, &header, kept) != 0)
        refuse("capset: %s", strerror(errno));
    for (unsigned cap = 0; cap < 64; cap++)
        if ((expected.keep >> cap & 1) && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) != 0)
            refuse("ambient capability %u: %s", cap, strerror(errno));
}

static const char *list_groups(char *text, size_t size, const gid_t *groups, size_t count)
{
    size_t used = (size_t)snprintf(text, size, "%s", count == 0 ? "none" : "");

    for (size_t i = 0; i < count; i++) {
        if (size - used < 24) {
            snprintf(text + used, size - used, ",...");
            break;
        }
        used += (size_t)snprintf(text + used, size - used, i == 0 ? "%u" : ",%u", groups[i]);
    }
    return text;
}

static void check_groups(void)
{
    char want[512], have[512];
    int count = getgroups(NGROUPS_MAX, actual_groups);

    if (count < 0)
        refuse("getgroups: %s", strerror(errno));
    size_t actual = normalise_groups(actual_groups, (size_t)count, expected.gid);
    if (actual != expected.ngroups ||
        memcmp(actual_groups, expected.groups, actual * sizeof *actual_groups) != 0)
        refuse("groups: expected %s besides %u, is %s",
               list_groups(want, sizeof want, expected.groups, expected.ngroups), expected.gid,
               list_groups(have, sizeof have, actual_groups, actual));
}

static void check_capabilities(void)
{
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
    uint64_t bounding = 0, ambient = 0;

    read_capabilities(data);
    for (unsigned cap = 0; cap < 64; cap++) {
        int held = prctl(PR_CAPBSET_READ, cap, 0, 0, 0);
        if (held < 0)
            break; /* past the kernel's last capability */
        bounding |= (uint64_t)(held == 1) << cap;
        ambient |= (uint64_t)(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1) << cap;
    }
    uint64_t effective = join_words(data[0].effective, data[1].effective);
    uint64_t permitted = join_words(data[0].permitted, data[1].permitted);
    uint64_t inheritable = join_words(data[0].inheritable, data[1].inheritable);
    if (effective != expected.keep || permitted != expected.keep || inheritable != expected.keep ||
        ambient != expected.keep) {
        char want[32] = "none";
        if (expected.keep != 0)
            snprintf(want, sizeof want, "%llx", (unsigned long long)expected.keep);
        refuse("capabilities: expected %s, is effective %llx, permitted %llx, inheritable %llx, ambient %llx", want,
               (unsigned long long)effective, (unsigned long long)permitted, (unsigned long long)inheritable,
               (unsigned long long)ambient);
    }
    if ((bounding & ~expected.caps) != 0)
        refuse("capabilities: expected a bounding set within %llx, is %llx",
               (unsigned long long)expected.caps, (unsigned long long)bounding);
}

static void check_identity(void)
{
    uid_t uid[3];
    gid_t gid[3];

    if (getresuid(&uid[0], &uid[1], &uid[2]) != 0 || getresgid(&gid[0], &gid[1], &gid[2]) != 0)
        refuse("getresuid: %s", strerror(errno));
    if (uid[0] != expected.uid || uid[1] != expected.uid || uid[2] != expected.uid)
        refuse("uid: expected %u, is %u (effective %u, saved %u)", expected.uid, uid[0], uid[1], uid[2]);
    if (gid[0] != expected.gid || gid[1] != expected.gid || gid[2] != expected.gid)
        refuse("gid: expected %u, is %u (effective %u, saved %u)", expected.gid, gid[0], gid[1], gid[2]);
    check_groups();
    check_capabilities();
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1)
        refuse("no_new_privs: expected 1, could not be set");
}

static void become_job(const char *dir)
{
    control_size = read_whole(dir, "job", control, CONTROL_MAX);
    parse_control();
    take_identity();
    check_identity();
}

/* ---- secrets ----------------------------------------------------------------------------------------- */

struct secret {
    const char *name, *variable;
    char *value; /* a NUL follows */
    size_t length;
};

/* The text at `p` up to its NUL, and where what follows it begins; the buffer's last byte is a NUL. */
static const char *take_text(char **p)
{
    const char *text = *p;

    if (text >= secrets + secrets_size)
        refuse("secrets: the last one is cut off");
    *p += strlen(text) + 1;
    return text;
}

/* The secret at `p`, which is moved behind it. */
static struct secret take_secret(char **p)
{
    struct secret secret = {.name = take_text(p)};
    uint64_t length;

    secret.variable = take_text(p);
    const char *digits = take_text(p), *end = parse_number(digits, 10, SECRETS_MAX, &length);

    if (secret.name[0] == '\0' || secret.name[0] == '.' || strchr(secret.name, '/') != NULL)
        refuse("secrets: \"%.200s\" is no file's name", secret.name);
    if (strchr(secret.variable, '=') != NULL)
        refuse("secrets: \"%.200s\" is no variable's name", secret.variable);
    if (end == NULL || *end != '\0' || length >= (uint64_t)(secrets + secrets_size - *p) || (*p)[length] != '\0')
        refuse("secrets: the length of %s is wrong", secret.name);
    secret.value = *p;
    secret.length = (size_t)length;
    *p += length + 1;
    return secret;
}

/* /run/secrets as the server asked for it. Were it part of the image's file system, or a volume, what is written
 * there would be kept, and shown to others. */
static int open_secrets(void)
{
    int dir = open(SECRETS_DIR, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct statfs system;
    struct stat status;

    if (dir < 0 || fstatfs(dir, &system) != 0 || fstat(dir, &status) != 0)
        refuse("secrets: %s: %s", SECRETS_DIR, strerror(errno));
    if (system.f_type != TMPFS_MAGIC)
        refuse("secrets: %s is not in memory", SECRETS_DIR);
    if (status.st_uid != expected.uid || (status.st_mode & 077) != 0)
        refuse("secrets: %s is not the job's alone", SECRETS_DIR);
    return dir;
}

static void write_secret(int dir, const struct secret *secret)
{
    int fd = openat(dir, secret->name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0400);

    if (fd < 0 || fchmod(fd, 0400) != 0) /* the mode is subject to the umask */
        refuse("secrets: %s/%s: %s", SECRETS_DIR, secret->name, strerror(errno));
    for (size_t done = 0; done < secret->length;) {
        ssize_t n = write(fd, secret->value + done, secret->length - done);
        if (n < 0 && errno != EINTR)
            refuse("secrets: %s/%s: %s", SECRETS_DIR, secret->name, strerror(errno));
        if (n > 0)
            done += (size_t)n;
    }
    close(fd);
}

/* Before the gate: what is wrong with them ends the job while its program has not begun. */
static void read_secrets(const char *dir, bool write_them)
{
    if (!expected.secrets)
        return;
    secrets_size = read_whole(dir, "secrets", secrets, SECRETS_MAX);
    int place = write_them ? open_secrets() : -1;
    for (char *p = secrets; p < secrets + secrets_size;) {
        struct secret secret = take_secret(&p);
        if (write_them)
            write_secret(place, &secret);
    }
    if (write_them)
        close(place);
}

/* As variables, over those of the control file: without the end of line that a file of one line has, as the shell's
 * $(cat FILE) gives it. Nothing of them stays in this process but that. */
static void apply_secrets(void)
{
    for (char *p = secrets; p < secrets + secrets_size;) {
        struct secret secret = take_secret(&p);
        if (secret.variable[0] == '\0')
            continue;
        while (secret.length > 0 && secret.value[secret.length - 1] == '\n')
            secret.value[--secret.length] = '\0';
        if (setenv(secret.variable, secret.value, 1) != 0)
            refuse("secrets: the variable %s: %s", secret.variable, strerror(errno));
    }
    explicit_bzero(secrets, secrets_size);
    secrets_size = 0;
}

/* ---- the program ------------------------------------------------------------------------------------- */

/* Say why `path` did not start, in words that name what to mend; the exit code is the shells' one. */
static int explain_exec(const char *name, const char *path, int error)
{
    char head[256];
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    ssize_t n = fd < 0 ? -1 : read(fd, head, sizeof head - 1);

    head[n < 0 ? 0 : n] = '\0';
    if ((error == ENOENT || error == ENOTDIR) && strncmp(head, "#!", 2) == 0) {
        char *interpreter = head + 2 + strspn(head + 2, " \t");
        interpreter[strcspn(interpreter, " \t\n")] = '\0';
        size_t length = strlen(interpreter);
        if (length > 0 && interpreter[length - 1] == '\r') {
            interpreter[length - 1] = '\0';
            complain("%s: %s: its first line asks for \"%s\" and a carriage return: the file has Windows "
                     "line ends", name, strerror(error), interpreter);
        } else {
            complain("%s: %s: its first line asks for %s, which is not in the image", name, strerror(error),
                     interpreter);
        }
    } else if (error == ENOENT && n >= 4 && memcmp(head, "\177ELF", 4) == 0) {
        complain("%s: %s: its program loader is not in the image (built for another C library?)", name,
                 strerror(error));
    } else if (error == ENOEXEC) {
        complain("%s: exec format error: built for another architecture, or a script without a first line #!",
                 name);
    } else if (error == EACCES && stat(path, &status) == 0) {
        complain("%s: %s: %s", name, strerror(error),
                 S_ISDIR(status.st_mode) ? "it is a directory" : "it is not executable for this user (chmod a+rx)");
    } else {
        complain("%s: %s", name, strerror(error));
    }
    return error == ENOENT || error == ENOTDIR ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE;
}

/*
 * execvp with three differences: the Engine's PATH by default, no second try of a headless file by /bin/sh, and
 * a directory of PATH that this user may not search (/root/bin in an image made by root) is not taken for the
 * program, but told where it may be the reason. Returns the exit code, as it only returns when it failed.
 */
static int exec_program(char **argv)
{
    const char *name = argv[0], *search = getenv("PATH");
    char path[PATH_MAX], found[PATH_MAX] = "", closed[PATH_MAX] = "";
    int found_error = 0;

    if (strchr(name, '/') != NULL || *name == '\0') {
        execve(name, argv, environ);
        return explain_exec(name, name, errno);
    }
    if (search == NULL)
        search = DEFAULT_PATH;
    for (const char *part = search, *end;; part = end + 1) {
        end = strchrnul(part, ':');
        const int length = (int)(end - part);
        /* An empty part means the working directory. */
        const char *slash = length > 0 ? "/" : "";
        if (snprintf(path, sizeof path, "%.*s%s%s", length, part, slash, name) < (int)sizeof path) {
            execve(path, argv, environ);
            int error = errno;
            if (access(path, F_OK) == 0) {
                if (found_error == 0) {
                    strcpy(found, path);
                    found_error = error;
                }
                if (error != ENOENT && error != ENOTDIR && error != EACCES)
                    break; /* this is the program, and it cannot be started */
            } else if (error == EACCES && closed[0] == '\0') {
                snprintf(closed, sizeof closed, "%.*s", length, part);
            }
        }
        if (*end == '\0')
            break;
    }
    if (found_error != 0)
        return explain_exec(name, found, found_error);
    if (closed[0] != '\0')
        complain("%s: %s (%s, of PATH, is closed to this user)", name, strerror(ENOENT), closed);
    else
        complain("%s: %s", name, strerror(ENOENT));
    return EXIT_NOT_FOUND;
}

static void reset_signals(void)
{
    static const unsigned long by_default[4]; /* the kernel's own struct sigaction, zero: SIG_DFL, no flags */
    sigset_t none;

    /* Not by libc, which keeps its hands off its own two (32 and 33): who ignored them would pass that on. */
    for (int number = 1; number < NSIG; number++)
        syscall(SYS_rt_sigaction, number, by_default, NULL, sizeof(unsigned long)); /* SIGKILL, SIGSTOP refuse */
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* ---- run: the gate and PID 1 ------------------------------------------------------------------------- */

static void end_at_once(int number)
{
    _exit(128 + number);
}

/* PID 1 has no default actions: without handlers a job that waits at the gate could not be stopped. Every signal
 * that ends a process by default and may be a job's stop_signal. */
static void end_on_signals(void)
{
    static const int ending[] = {SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM, SIGALRM};
    struct sigaction action = {.sa_handler = end_at_once};

    reset_signals();
    for (size_t i = 0; i < sizeof ending / sizeof *ending; i++)
        sigaction(ending[i], &action, NULL);
    for (int number = SIGRTMIN; number <= SIGRTMAX; number++)
        sigaction(number, &action, NULL);
}

static void obey(const char *dir, const char *name, char word)
{
    if (word == 'x')
        exit(EXIT_REFUSED); /* the server knows why, and tells it */
    if (word != 'g')
        refuse("%s/%s: expected 'g' or 'x', is byte %d", dir, name, (unsigned char)word);
}

/* Look for the file with the server's word: nothing tells a process in gVisor that a file of the host has appeared.
 * The server writes it under another name first, so that it is never seen empty. */
static void look_for_word(const char *dir)
{
    static const struct timespec pause = {.tv_nsec = FILEGATE_NS};
    char path[PATH_MAX], word;

    if (snprintf(path, sizeof path, "%s/word", dir) >= (int)sizeof path)
        refuse("%s: the path is too long", dir);
    while (access(path, F_OK) != 0) {
        if (errno != ENOENT && errno != EINTR)
            refuse("%s: %s", path, strerror(errno));
        nanosleep(&pause, NULL);
    }
    int fd = open_control(dir, "word", O_NONBLOCK);
    struct stat status;
    if (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode) || read(fd, &word, 1) != 1)
        refuse("%s is not a file with a word", path);
    close(fd);
    obey(dir, "word", word);
}

/*
 * Wait for the server's word. It holds the FIFO open for reading and writing since before the container's start,
 * so end of file means that it died: opening again blocks until the next server has the FIFO open. The old
 * descriptor is kept meanwhile, so that what is written in between stays in the pipe.
 */
static void wait_at_gate(const char *dir)
{
    int fd = -1;
    char word;

    for (;;) {
        int opened = open_control(dir, "gate", 0);
        struct stat status;
        if (fstat(opened, &status) < 0 || !S_ISFIFO(status.st_mode))
            refuse("%s/gate is not a FIFO", dir); /* end of file would never block */
        if (fd >= 0)
            close(fd);
        fd = opened;
        ssize_t n;
        do
            n = read(fd, &word, 1);
        while (n < 0 && errno == EINTR);
        if (n < 0)
            refuse("%s/gate: %s", dir, strerror(errno));
        if (n == 1)
            break;
    }
    close(fd);
    obey(dir, "gate", word);
}

/* Reap whoever ended; true when the program itself did. */
static bool reap(pid_t program, int *code)
{
    int status;
    pid_t pid;
    bool ended = false;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0 || (pid < 0 && errno == EINTR))
        if (pid == program) {
            ended = true;
            *code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        }
    return ended;
}

/* Start the program in a process group of its own, pass signals on to that group, reap. When it ends so do we,
 * and the kernel ends the rest of the PID namespace. */
static int run_program(char **argv)
{
    sigset_t all;
    int code = 0;

    /* From here signals wait until sigwaitinfo takes them: none is lost between the fork and the loop. Faults of
     * our own still kill. A blocked SIGTTOU also lets the child take the terminal from the background. */
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    pid_t program = fork();
    if (program < 0)
        refuse("fork: %s", strerror(errno));
    if (program == 0) {
        setpgid(0, 0);
        tcsetpgrp(STDIN_FILENO, getpgrp()); /* ENOTTY where stdin is no terminal of ours, which is as well */
        reset_signals();
        _exit(exec_program(argv));
    }
    setpgid(program, program); /* both do it, as a signal may come before the child has run */
    for (;;) {
        int number = sigwaitinfo(&all, NULL);
        if (number == SIGCHLD) {
            if (reap(program, &code))
                return code;
        } else if (number > 0) {
            /* To the program alone, as without an init: its data loaders must not die before its own handler
             * has saved a checkpoint. */
            kill(program, number);
        }
    }
}

static int run(const char *dir, char **argv)
{
    end_on_signals();
    become_job(dir);
    if (getpid() != 1)
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); /* orphans come to PID 1 by themselves, to others by this */
    read_secrets(dir, true);
    if (!expected.nogate) {
        /* On the host other processes of this uid could trace us and run code of theirs before the gate. */
        int dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
        (expected.filegate ? look_for_word : wait_at_gate)(dir);
        prctl(PR_SET_DUMPABLE, dumpable == 1, 0, 0, 0);
    }
    apply_environment();
    apply_secrets();
    return run_program(argv);
}

/* ---- probe ------------------------------------------------------------------------------------------- */

enum answer { UNTRIED, ALLOW, DENY, NO_NODE, NO_JOIN, NO_ACCESS };

struct device {
    unsigned major, minor;
    enum answer answer;
    int error;
};

static size_t parse_devices(struct device *devices, const char *text, size_t count)
{
    uint64_t major, first, last;
    const char *p = parse_number(text, 10, MAJOR_MAX, &major);

    if (p != NULL && *p == ':' && (p = parse_number(p + 1, 10, MINOR_MAX, &first)) != NULL) {
        last = first;
        if (*p == '-')
            p = parse_number(p + 1, 10, MINOR_MAX, &last);
        if (p != NULL && *p == '\0' && first <= last) {
            if (last - first >= DEVICES_MAX - count)
                refuse("probe: more than %d devices", DEVICES_MAX);
            for (uint64_t minor = first; minor <= last; minor++)
                devices[count++] = (struct device){.major = (unsigned)major, .minor = (unsigned)minor};
            return count;
        }
    }
    refuse("probe: \"%s\" is not MAJOR:MINOR or MAJOR:FIRST-LAST", text);
}

/* In the child: enter the cgroups, then ask for each node. */
static void ask(struct device *devices, size_t count, int dir, char **joins, size_t njoins)
{
    char name[24];

    for (size_t i = 0; i < njoins; i++) {
        int fd = open(joins[i], O_WRONLY | O_CLOEXEC), error = errno;
        if (fd >= 0) {
            error = write(fd, "0", 1) == 1 ? 0 : errno; /* 0 is the writer itself, in any PID namespace */
            close(fd);
        }
        if (error != 0) {
            complain("probe: %s: %s", joins[i], strerror(error));
            for (size_t d = 0; d < count; d++)
                if (devices[d].answer == UNTRIED)
                    devices[d].answer = NO_JOIN, devices[d].error = error;
            return;
        }
    }
    for (size_t d = 0; d < count; d++) {
        if (devices[d].answer != UNTRIED)
            continue;
        snprintf(name, sizeof name, "%zu", d);
        /* inode_permission() asks the device cgroup, v1 and v2, before modes and modules: EPERM is its no. The
         * device is not opened, so no driver runs and no GPU wakes. */
        if (faccessat(dir, name, R_OK | W_OK, 0) == 0)
            devices[d].answer = ALLOW;
        else
            devices[d].answer = errno == EPERM ? DENY : NO_ACCESS, devices[d].error = errno;
    }
}

static bool tell(const struct device *device, int status)
{
    printf("%u:%u ", device->major, device->minor);
    switch (device->answer) {
    case ALLOW:
    case DENY:
        return puts(device->answer == ALLOW ? "allow" : "deny") >= 0;
    case UNTRIED:
        printf("error probe: ended by signal %d\n", WIFSIGNALED(status) ? WTERMSIG(status) : 0);
        break;
    case NO_NODE:
    case NO_JOIN:
    case NO_ACCESS:
        printf("error %s: %s\n", device->answer == NO_NODE ? "mknod" : device->answer == NO_JOIN ? "join" : "access",
               strerror(device->error));
    }
    return false;
}

/*
 * The nodes are made before the child enters the cgroup, which may forbid mknod, and removed by this process,
 * which stays outside: a container that is frozen or killed meanwhile cannot leave them behind.
 */
static int probe(char **argv)
{
    const char *base = "/dev";
    char path[PATH_MAX], name[24], *joins[32];
    size_t count = 0, njoins = 0;
    struct device *devices = mmap(NULL, DEVICES_MAX * sizeof *devices, PROT_READ | PROT_WRITE,
                                  MAP_SHARED | MAP_ANONYMOUS, -1, 0); /* shared with the child */
    static const int ending[] = {SIGTERM, SIGINT, SIGHUP};
    int status = 0, interrupted = 0;
    sigset_t handled;

    if (devices == MAP_FAILED)
        refuse("probe: %s", strerror(errno));
    for (; *argv != NULL; argv++) {
        bool is_dir = strcmp(*argv, "--dir") == 0, is_join = strcmp(*argv, "--join") == 0;
        if ((is_dir || is_join) && argv[1] == NULL)
            refuse("probe: %s needs a path", *argv);
        if (is_dir)
            base = *++argv;
        else if (is_join && njoins == sizeof joins / sizeof *joins)
            refuse("probe: more than %zu --join", njoins);
        else if (is_join)
            joins[njoins++] = *++argv;
        else
            count = parse_devices(devices, *argv, count);
    }
    if (count == 0)
        refuse("probe: no device named");

    reset_signals();
    sigemptyset(&handled);
    for (size_t i = 0; i < sizeof ending / sizeof *ending; i++)
        sigaddset(&handled, ending[i]);
    sigaddset(&handled, SIGCHLD);
    sigprocmask(SIG_BLOCK, &handled, NULL);
    signal(SIGPIPE, SIG_IGN);
    if (snprintf(path, sizeof path, "%s/gpujobs-probe-XXXXXX", base) >= (int)sizeof path || mkdtemp(path) == NULL)
        refuse("probe: cannot make a directory in %s: %s", base, strerror(errno));
    int dir = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    for (size_t d = 0; d < count; d++) {
        snprintf(name, sizeof name, "%zu", d);
        if (mknodat(dir, name, S_IFCHR | 0600, makedev(devices[d].major, devices[d].minor)) != 0)
            devices[d].answer = NO_NODE, devices[d].error = errno;
    }
    pid_t parent = getpid(), child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        if (getppid() == parent)
            ask(devices, count, dir, joins, njoins);
        _exit(0);
    }
    while (child > 0) {
        int number = sigwaitinfo(&handled, NULL);
        if (number == SIGCHLD && waitpid(child, &status, WNOHANG) == child)
            break;
        if (number > 0 && number != SIGCHLD) {
            interrupted = number; /* not waited for: a frozen cgroup holds the child back */
            kill(child, SIGKILL);
            break;
        }
    }
    for (size_t d = 0; d < count; d++) {
        snprintf(name, sizeof name, "%zu", d);
        unlinkat(dir, name, 0);
    }
    rmdir(path);
    if (child < 0)
        refuse("probe: fork failed");
    if (interrupted != 0)
        return 128 + interrupted;
    bool tried = true;
    for (size_t d = 0; d < count; d++)
        tried &= tell(&devices[d], status);
    return fflush(stdout) == 0 && tried ? 0 : 1;
}

/* ------------------------------------------------------------------------------------------------------ */

int main(int argc, char **argv)
{
    const char *dir = CONTROL_DIR;
    int i = 1;

    if (argc > 2 && strcmp(argv[1], "--dir") == 0) {
        dir = argv[2];
        i = 3;
    }
    const char *mode = i < argc ? argv[i++] : "";
    if (strcmp(mode, "probe") == 0 && i == 2)
        return probe(argv + i);
    if (strcmp(mode, "--version") == 0)
        return puts(VERSION) < 0;
    if (strcmp(mode, "run") != 0 && strcmp(mode, "exec") != 0)
        refuse("usage: gpujobs-init [--dir DIR] run|exec PROGRAM [ARGUMENT...] | "
               "probe [--dir DIR] [--join FILE]... MAJOR:MINOR[-MINOR]... | --version");
    if (i >= argc)
        refuse("no program: neither the job nor its image names a command");
    if (strcmp(mode, "run") == 0)
        return run(dir, argv + i);
    become_job(dir);
    read_secrets(dir, false);
    apply_environment();
    apply_secrets();
    reset_signals();
    return exec_program(argv + i);
}
