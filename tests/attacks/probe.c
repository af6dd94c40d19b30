/* Tries, one after the other, what a job must not be able to do; prints "name result" lines, where the result is
 * "done" or the kernel's error; with the name of an attempt, only that. Linked statically: it runs in any image. It
 * touches only its own container and the files that the test has put at /v, /r, /e and /s.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <grp.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

#define GPU makedev(195, 7)
#define ZERO makedev(1, 5)

static int opened(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC, 0644);
    return fd < 0 ? -1 : close(fd);
}

static int setuid_root(void) { return setresuid(0, 0, 0); }
static int setgid_shadow(void) { return setresgid(42, 42, 42); }
static int setgroups_shadow(void) { gid_t gid = 42; return setgroups(1, &gid); }
static int chown_to_root(void) { return chown("/v/mine", 0, 0); }
static int read_roots_file(void) { return opened("/e/secret", O_RDONLY); }
static int write_roots_directory(void) { return opened("/e/planted", O_WRONLY | O_CREAT); }
static int mknod_gpu(void) { unlink("/v/made-gpu"); return mknod("/v/made-gpu", S_IFCHR | 0666, GPU); }
static int open_node_in_volume(void) { return opened("/v/zero", O_RDONLY); }
static int write_read_only_volume(void) { return opened("/r/planted", O_WRONLY | O_CREAT); }
static int write_read_only_submount(void) { return opened("/r/below/planted", O_WRONLY | O_CREAT); }
static int remount_read_only_volume(void) { return mount(NULL, "/r", NULL, MS_REMOUNT | MS_BIND, NULL); }
static int mount_tmpfs(void) { return mount("none", "/tmp", "tmpfs", 0, NULL); }
static int umount_hosts_file(void) { return umount2("/etc/hosts", MNT_DETACH); }
static int unshare_user(void) { return unshare(CLONE_NEWUSER); }
static int unshare_mounts(void) { return unshare(CLONE_NEWNS); }
static int chroot_away(void) { return chroot("/tmp"); }
static int set_hostname(void) { return sethostname("attacked", 8); }
static int raw_socket(void) { int s = socket(AF_INET, SOCK_RAW, 1); return s < 0 ? -1 : close(s); }
static int packet_socket(void) { int s = socket(AF_PACKET, SOCK_RAW, 0); return s < 0 ? -1 : close(s); }
static int write_proc_sys(void) { return opened("/proc/sys/kernel/hostname", O_WRONLY); }
static int write_proc_irq(void) { return opened("/proc/irq/default_smp_affinity", O_WRONLY); }
static int read_kmsg(void) { return opened("/dev/kmsg", O_RDONLY); }
static int raise_priority(void) { return setpriority(PRIO_PROCESS, 0, -5); }
static int edit_group_file(void) { return opened("/etc/group", O_WRONLY | O_APPEND); }

static int write_cgroup(void)
{
    if (opened("/sys/fs/cgroup/pids/cgroup.procs", O_WRONLY) == 0)
        return 0;
    return errno == ENOENT ? opened("/sys/fs/cgroup/cgroup.procs", O_WRONLY) : -1;
}

static int read_kernel_keys(void)
{
    char byte;
    int fd = open("/proc/keys", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, &byte, 1);
    if (n == 0)
        errno = ENODATA; /* the Engine has put an empty file over it */
    return n == 1 ? 0 : -1;
}

static int core_files(void)
{
    struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
    return setrlimit(RLIMIT_CORE, &limit);
}

static int open_by_handle(void)
{
    union { struct file_handle h; char room[sizeof(struct file_handle) + MAX_HANDLE_SZ]; } u;
    int mount_id, top = open("/e", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top < 0)
        return -1;
    u.h.handle_bytes = MAX_HANDLE_SZ;
    if (name_to_handle_at(AT_FDCWD, "/e", &u.h, &mount_id, 0) < 0)
        return -1;
    int fd = open_by_handle_at(top, &u.h, O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -1 : close(fd);
}

static int keyring(void)
{
    return syscall(SYS_add_key, "user", "gpujobs-attack", "x", 1, -2 /* the process's own */) < 0 ? -1 : 0;
}

static int bpf_map(void)
{
    union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    int fd = syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr);
    return fd < 0 ? -1 : close(fd);
}

static int fault_fd(void)
{
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    return fd < 0 ? -1 : close(fd);
}

static int host_process(void)
{
    const char *pid = getenv("HOST_PID");
    char path[64], word[64] = "";
    snprintf(path, sizeof path, "/proc/%s/comm", pid);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return -1;
    if (fgets(word, sizeof word, file) == NULL)
        word[0] = 0;
    fclose(file);
    word[strcspn(word, "\n")] = 0;
    if (strcmp(word, getenv("HOST_COMM")) != 0) {
        errno = ESRCH;
        return -1;
    }
    return kill(atoi(pid), 0);
}

static int write_control_directory(void)
{
    DIR *root = opendir("/");
    char path[512];
    for (struct dirent *entry; (entry = readdir(root)) != NULL;)
        if (strncmp(entry->d_name, ".gpujobs", 8) == 0) {
            snprintf(path, sizeof path, "/%s/job", entry->d_name);
            closedir(root);
            return opened(path, O_WRONLY);
        }
    closedir(root);
    errno = ENOENT;
    return -1;
}

/* A setuid copy of this program says with its exit code whether it is root. */
static int root_by(const char *program)
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        execl(program, program, "whoami", NULL);
        _exit(errno == ENOENT ? 3 : 2);
    }
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return 0;
    errno = WIFEXITED(status) && WEXITSTATUS(status) == 3 ? ENOENT : EPERM;
    return -1;
}

static int setuid_in_volume(void) { return root_by("/v/suid"); }
static int setuid_in_image(void) { return root_by("/suid"); }

static int open_node_of_image(void)
{
    /* No driver is behind it: ENXIO says that the device policy let it through. */
    if (opened("/baked-gpu", O_RDWR) == 0 || errno == ENXIO)
        return 0;
    return -1;
}

static int ask_the_server(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/s/s.sock"};
    static char answer[1 << 16];
    size_t got = 0;
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(s, (void *)&address, sizeof address) < 0)
        return -1;
    const char question[] = "GET /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    if (write(s, question, sizeof question - 1) < 0)
        return -1;
    for (ssize_t n; got < sizeof answer - 1 && (n = read(s, answer + got, sizeof answer - 1 - got)) > 0;)
        got += n;
    answer[got] = 0;
    close(s);
    if (strstr(answer, " 200 ") != NULL)
        return 0;
    errno = strstr(answer, "inside containers") != NULL ? EACCES : EPROTO;
    return -1;
}

#define TRY(name) {#name, name}
static const struct { const char *name; int (*attempt)(void); } attempts[] = {
    TRY(read_roots_file), TRY(write_roots_directory), TRY(open_node_in_volume), TRY(open_node_of_image),
    TRY(write_read_only_volume), TRY(write_read_only_submount), TRY(remount_read_only_volume),
    TRY(setuid_in_volume), TRY(setuid_in_image), TRY(chown_to_root), TRY(mknod_gpu), TRY(mount_tmpfs),
    TRY(umount_hosts_file), TRY(set_hostname), TRY(raw_socket), TRY(packet_socket), TRY(write_proc_sys),
    TRY(write_proc_irq), TRY(read_kernel_keys), TRY(read_kmsg), TRY(write_cgroup), TRY(raise_priority), TRY(core_files),
    TRY(open_by_handle), TRY(keyring), TRY(bpf_map), TRY(fault_fd), TRY(host_process), TRY(edit_group_file),
    TRY(write_control_directory), TRY(ask_the_server), TRY(setgroups_shadow), TRY(setgid_shadow),
    TRY(setuid_root), TRY(unshare_mounts), TRY(unshare_user), TRY(chroot_away),
};

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "whoami") == 0)
        return geteuid() == 0 ? 0 : 1;
    for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++) {
        int result = -1, status;
        if (argc > 1 && strcmp(argv[1], attempts[i].name) != 0)
            continue;
        fflush(stdout);
        pid_t child = fork(); /* each by itself: one that succeeds must not help the next */
        if (child == 0) {
            result = attempts[i].attempt();
            printf("%s %s\n", attempts[i].name, result == 0 ? "done" : strerrorname_np(errno));
            fflush(stdout);
            _exit(0);
        }
        waitpid(child, &status, 0);
        if (!WIFEXITED(status))
            printf("%s signal%d\n", attempts[i].name, WTERMSIG(status));
    }
    return 0;
}
