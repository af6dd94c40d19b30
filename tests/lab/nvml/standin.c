/*
 * A stand-in for NVIDIA's management library, for machines without a GPU.
 *
 * Built as libnvidia-ml.so.1, it is loaded by its soname by the real pynvml, so what is tested is the
 * binding and the program above it, not a Python fake.  It describes the machine in a text file, named by
 * the environment variable LAB_NVML_STATE, that is looked at again on every call: a test changes the file
 * (by an atomic rename) and the next query sees the new machine.  The file's grammar is parse_line() below;
 * tests/lab/nvml.py writes it.
 *
 * Answers follow the documentation of NVML's functions (nvml.h) and what real drivers are seen to do:
 * INSUFFICIENT_SIZE for a process list's probe, NOT_FOUND for empty MIG slots and missing samples,
 * NOT_SUPPORTED for utilisation in MIG mode, GPU_IS_LOST for every query of a lost GPU, dead handles after
 * a reload of the driver.  nvml.h is not needed to build: layouts are declared here and their sizes checked.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

enum {
    OK = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    LIB_RM_VERSION_MISMATCH = 18,
    MEMORY_ERROR = 20,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999
};
typedef int ret_t;

/* ------------------------------------------------------------------ layouts of nvml.h */

typedef struct { char bus_id_legacy[16]; unsigned domain, bus, device, device_id, subsystem_id; char bus_id[32]; } pci_info_t;
typedef struct { unsigned pid; unsigned long long memory; unsigned gi, ci; } process_info_t;
typedef struct { unsigned pid; unsigned long long memory; } process_info_v1_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { unsigned pid; unsigned long long timestamp; unsigned sm, memory, encoder, decoder; } sample_t;
typedef struct {
    unsigned sm_count, copy_engines, decoders, encoders, jpeg, ofa, gi_slices, ci_slices;
    unsigned long long memory_mib;
} attributes_t;
typedef struct { void *device; unsigned long long type, data; unsigned gi, ci; } event_data_t;
typedef struct { unsigned version, sensor; int celsius; } temperature_v1_t;
typedef union { double d; unsigned u; unsigned long ul; unsigned long long ull; long long sll; int si; unsigned short us; } value_t;
typedef struct { unsigned field, scope; long long timestamp, latency_us; unsigned type; int result; value_t value; } field_value_t;

_Static_assert(sizeof(pci_info_t) == 68, "nvmlPciInfo_t");
_Static_assert(sizeof(process_info_t) == 24, "nvmlProcessInfo_v2_t");
_Static_assert(sizeof(process_info_v1_t) == 16, "nvmlProcessInfo_v1_t");
_Static_assert(sizeof(memory_t) == 24, "nvmlMemory_t");
_Static_assert(sizeof(memory_v2_t) == 40, "nvmlMemory_v2_t");
_Static_assert(sizeof(sample_t) == 32, "nvmlProcessUtilizationSample_t");
_Static_assert(sizeof(attributes_t) == 40, "nvmlDeviceAttributes_t");
_Static_assert(sizeof(event_data_t) == 32, "nvmlEventData_t");
_Static_assert(sizeof(temperature_v1_t) == 12, "nvmlTemperature_v1_t");
_Static_assert(sizeof(field_value_t) == 40, "nvmlFieldValue_t");

/* A structure's version word: its size, with the version's number in the top byte. */
#define VERSION_WORD(type, number) ((unsigned)(sizeof(type) | ((number) << 24)))

#define NO_INSTANCE 0xFFFFFFFFu
#define NO_MEMORY_VALUE (~0ULL)
#define MAX_LINKS 36 /* NVML_NVLINK_MAX_LINKS */
#define MAX_CPUS 1024
#define ULONG_BITS (8 * sizeof(unsigned long))

/* ------------------------------------------------------------------ the machine, as the file tells it */

typedef struct { unsigned pid; unsigned long long memory; char kind; unsigned gi, ci; char name[256]; } process_rec;
typedef struct { char function[64]; int code; } answer_rec;
typedef struct {
    unsigned slot, gi, ci, gi_slices, ci_slices, sm_count;
    unsigned long long memory;
    long long used; /* bytes; -1: the sum over its processes */
    char uuid[96], profile[48];
} mig_rec;
typedef struct { unsigned number; int peer; bool active; char pci[32]; } link_rec; /* peer -1: a switch at `pci` */

typedef struct {
    char uuid[96], name[96], serial[32], pci[32], cpus[512];
    unsigned minor, device_id, subsystem_id;
    unsigned long long total, reserved;
    long long used; /* bytes; -1: the sum over processes */
    unsigned util_gpu, util_memory, temperature, power, power_limit;
    unsigned long long energy;
    int cc_major, cc_minor;
    unsigned compute_mode, persistence;
    int ecc_mode; /* -1: no ECC on this card */
    unsigned long long ecc[2][2]; /* [corrected, uncorrected][volatile, aggregate] */
    int numa, own_numa;
    int mig_mode, mig_pending; /* -1: no MIG on this card */
    unsigned mig_max;
    bool lost, p2p;
    mig_rec *migs; size_t migs_n;
    process_rec *processes; size_t processes_n;
    sample_t *samples; size_t samples_n;
    answer_rec *answers; size_t answers_n;
    link_rec *links; size_t links_n;
} gpu_rec;

typedef struct { unsigned a, b, level; } level_rec;
typedef struct { unsigned long long sequence, type, data; unsigned gpu, gi, ci; } event_rec;

typedef enum { DRIVER_LOADED, DRIVER_ABSENT, DRIVER_MISMATCH } driver_state;

typedef struct {
    driver_state driver;
    unsigned long long generation;
    char driver_version[80], nvml_version[80];
    int cuda;
    bool reap, lost_handle_fails, lost_wait_fails;
    gpu_rec *gpus; size_t gpus_n;
    level_rec *levels; size_t levels_n;
    event_rec *events; size_t events_n;
} machine_t;

/* Grows an array by one zeroed element and gives its address, or NULL when out of memory. */
static void *append(void *array_pointer, size_t *count, size_t size) {
    void **array = array_pointer;
    char *grown = realloc(*array, (*count + 1) * size);
    if (!grown) return NULL;
    *array = grown;
    void *slot = grown + *count * size;
    memset(slot, 0, size);
    ++*count;
    return slot;
}

static void machine_free(machine_t *m) {
    if (!m) return;
    for (size_t i = 0; i < m->gpus_n; i++) {
        gpu_rec *g = &m->gpus[i];
        free(g->migs);
        free(g->processes);
        free(g->samples);
        free(g->answers);
        free(g->links);
    }
    free(m->gpus);
    free(m->levels);
    free(m->events);
    free(m);
}

/* Copies the rest of a line, refusing what does not fit (a silent cut would be a wrong machine). */
static bool text(char *to, size_t size, const char *from) {
    size_t n = strlen(from);
    if (n >= size) return false;
    memcpy(to, from, n + 1);
    return true;
}

#define TEXT(field) text(field, sizeof(field), rest)

/* Lines of a GPU's block.  All numbers are decimal but for PCI ids; bytes, milliwatts, millijoules, degrees C. */
static bool parse_gpu_line(gpu_rec *g, const char *key, const char *rest) {
    int used = 0, flag;
    if (!strcmp(key, "name")) return TEXT(g->name);
    if (!strcmp(key, "serial")) return TEXT(g->serial);
    if (!strcmp(key, "minor")) return sscanf(rest, "%u", &g->minor) == 1;
    if (!strcmp(key, "pci")) return sscanf(rest, "%31s %x %x", g->pci, &g->device_id, &g->subsystem_id) == 3;
    if (!strcmp(key, "memory")) return sscanf(rest, "%llu %llu %lld", &g->total, &g->reserved, &g->used) == 3;
    if (!strcmp(key, "utilization")) return sscanf(rest, "%u %u", &g->util_gpu, &g->util_memory) == 2;
    if (!strcmp(key, "temperature")) return sscanf(rest, "%u", &g->temperature) == 1;
    if (!strcmp(key, "power")) return sscanf(rest, "%u %u %llu", &g->power, &g->power_limit, &g->energy) == 3;
    if (!strcmp(key, "capability")) return sscanf(rest, "%d %d", &g->cc_major, &g->cc_minor) == 2;
    if (!strcmp(key, "mode")) return sscanf(rest, "%u %u", &g->compute_mode, &g->persistence) == 2;
    if (!strcmp(key, "ecc"))
        return sscanf(rest, "%d %llu %llu %llu %llu", &g->ecc_mode, &g->ecc[0][0], &g->ecc[1][0], &g->ecc[0][1],
                      &g->ecc[1][1]) == 5;
    if (!strcmp(key, "numa")) return sscanf(rest, "%d %d", &g->numa, &g->own_numa) == 2;
    if (!strcmp(key, "cpus")) return TEXT(g->cpus);
    if (!strcmp(key, "lost")) return sscanf(rest, "%d", &flag) == 1 && (g->lost = flag, true);
    if (!strcmp(key, "p2p")) return sscanf(rest, "%d", &flag) == 1 && (g->p2p = flag, true);
    if (!strcmp(key, "mig_mode")) return sscanf(rest, "%d %d %u", &g->mig_mode, &g->mig_pending, &g->mig_max) == 3;
    if (!strcmp(key, "mig")) {
        mig_rec *m = append(&g->migs, &g->migs_n, sizeof *m);
        return m && sscanf(rest, "%u %95s %u %u %u %u %u %llu %lld %47s", &m->slot, m->uuid, &m->gi, &m->ci, &m->gi_slices,
                           &m->ci_slices, &m->sm_count, &m->memory, &m->used, m->profile) == 10;
    }
    if (!strcmp(key, "process")) {
        process_rec *p = append(&g->processes, &g->processes_n, sizeof *p);
        return p && sscanf(rest, "%u %llu %c %u %u %n", &p->pid, &p->memory, &p->kind, &p->gi, &p->ci, &used) == 5 &&
               strchr("cgm", p->kind) && text(p->name, sizeof p->name, rest + used);
    }
    if (!strcmp(key, "sample")) {
        sample_t *s = append(&g->samples, &g->samples_n, sizeof *s);
        return s && sscanf(rest, "%u %llu %u %u %u %u", &s->pid, &s->timestamp, &s->sm, &s->memory, &s->encoder,
                           &s->decoder) == 6;
    }
    if (!strcmp(key, "answer")) {
        answer_rec *a = append(&g->answers, &g->answers_n, sizeof *a);
        return a && sscanf(rest, "%63s %d", a->function, &a->code) == 2;
    }
    if (!strcmp(key, "nvlink")) {
        link_rec *l = append(&g->links, &g->links_n, sizeof *l);
        if (!l || sscanf(rest, "%u %d %d %31s", &l->number, &flag, &l->peer, l->pci) != 4) return false;
        l->active = flag;
        return l->number < MAX_LINKS;
    }
    return false;
}

static bool parse_line(machine_t *m, const char *key, const char *rest) {
    int flag;
    if (!strcmp(key, "driver")) {
        if (!strcmp(rest, "loaded")) m->driver = DRIVER_LOADED;
        else if (!strcmp(rest, "absent")) m->driver = DRIVER_ABSENT;
        else if (!strcmp(rest, "mismatch")) m->driver = DRIVER_MISMATCH;
        else return false;
        return true;
    }
    if (!strcmp(key, "generation")) return sscanf(rest, "%llu", &m->generation) == 1;
    if (!strcmp(key, "driver_version")) return TEXT(m->driver_version);
    if (!strcmp(key, "nvml_version")) return TEXT(m->nvml_version);
    if (!strcmp(key, "cuda")) return sscanf(rest, "%d", &m->cuda) == 1;
    if (!strcmp(key, "reap")) return sscanf(rest, "%d", &flag) == 1 && (m->reap = flag, true);
    if (!strcmp(key, "lost_handle_fails")) return sscanf(rest, "%d", &flag) == 1 && (m->lost_handle_fails = flag, true);
    if (!strcmp(key, "lost_wait_fails")) return sscanf(rest, "%d", &flag) == 1 && (m->lost_wait_fails = flag, true);
    if (!strcmp(key, "gpu")) {
        gpu_rec *g = append(&m->gpus, &m->gpus_n, sizeof *g);
        if (!g) return false;
        g->minor = (unsigned)m->gpus_n - 1;
        g->used = g->ecc_mode = g->numa = g->own_numa = g->mig_mode = g->mig_pending = -1;
        g->p2p = true;
        return TEXT(g->uuid);
    }
    if (!strcmp(key, "level")) {
        level_rec *l = append(&m->levels, &m->levels_n, sizeof *l);
        return l && sscanf(rest, "%u %u %u", &l->a, &l->b, &l->level) == 3;
    }
    if (!strcmp(key, "event")) {
        event_rec *e = append(&m->events, &m->events_n, sizeof *e);
        return e && sscanf(rest, "%llu %u %llu %llu %u %u", &e->sequence, &e->gpu, &e->type, &e->data, &e->gi, &e->ci) == 6;
    }
    return m->gpus_n && parse_gpu_line(&m->gpus[m->gpus_n - 1], key, rest);
}

#define HEADER "lab-nvml 1\n"

static machine_t *machine_read(FILE *file, const char *path) {
    machine_t *m = calloc(1, sizeof *m);
    char *line = NULL;
    size_t room = 0, number = 1;
    ssize_t n = getline(&line, &room, file);
    bool good = m && n > 0 && !strcmp(line, HEADER), ended = false;
    while (good && (n = getline(&line, &room, file)) > 0) {
        number++;
        if (line[n - 1] == '\n') line[n - 1] = 0;
        if (!*line || *line == '#') continue;
        if (!strcmp(line, "end")) { ended = true; break; }
        char *rest = strchr(line, ' ');
        if (rest) *rest++ = 0;
        good = parse_line(m, line, rest ? rest : "");
    }
    for (size_t i = 0; m && good && i < m->gpus_n; i++) /* indexes that point nowhere would be read out of bounds */
        for (size_t l = 0; l < m->gpus[i].links_n; l++) good &= m->gpus[i].links[l].peer < (int)m->gpus_n;
    for (size_t i = 0; m && good && i < m->events_n; i++) good &= m->events[i].gpu < m->gpus_n;
    if (!good || !ended) {
        fprintf(stderr, "NVML stand-in: %s, line %zu: %s\n", path, number, good ? "the file has no end" : "not understood");
        machine_free(m);
        m = NULL;
    }
    free(line);
    return m;
}

/* ------------------------------------------------------------------ what this process knows */

/* A handle names a GPU or MIG device by UUID within one initialisation.  Handles are never freed, so that a
 * stale one can be told from a valid one by looking it up. */
typedef struct handle { struct handle *next; unsigned long long epoch; char uuid[96]; } handle_t;

typedef struct { char uuid[96]; unsigned long long types, seen; } registration_t;
typedef struct event_set {
    struct event_set *next;
    unsigned long long epoch;
    bool live;
    registration_t *registrations; size_t registrations_n;
} event_set_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static machine_t *machine;       /* what the file said last; NULL: no file, or not understood */
static struct stat machine_stat; /* of the file that was read */
static bool machine_bad;         /* a file is there, but was not understood */
static handle_t *handles;
static event_set_t *event_sets;
static unsigned init_count;
static unsigned long long epoch, generation; /* of the present initialisation */
static bool detached;                        /* the driver was away or another one since */

static bool same_file(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec &&
           a->st_ctim.tv_sec == b->st_ctim.tv_sec && a->st_ctim.tv_nsec == b->st_ctim.tv_nsec;
}

/* Looks at the state file again.  The stamp is taken from the opened file, so it belongs to what was read. */
static void refresh(void) {
    const char *path = getenv("LAB_NVML_STATE");
    struct stat now;
    if (!path || stat(path, &now)) {
        machine_free(machine);
        machine = NULL;
        machine_bad = false;
        memset(&machine_stat, 0, sizeof machine_stat);
        return;
    }
    if (same_file(&now, &machine_stat)) return;
    FILE *file = fopen(path, "re");
    if (!file) return; /* renamed away in between: the next call sees what came in its place */
    if (!fstat(fileno(file), &machine_stat)) {
        machine_free(machine);
        machine = machine_read(file, path);
        machine_bad = !machine;
    }
    fclose(file);
}

/* Takes the lock and says whether the library may be asked now. */
static ret_t enter(void) {
    pthread_mutex_lock(&lock);
    if (!init_count) return UNINITIALIZED;
    refresh();
    if (machine_bad) return UNKNOWN;
    if (!machine || machine->driver == DRIVER_ABSENT) {
        detached = true;
        return DRIVER_NOT_LOADED;
    }
    if (machine->generation != generation) detached = true;
    return detached ? UNINITIALIZED : OK;
}

static ret_t leave(ret_t r) {
    pthread_mutex_unlock(&lock);
    return r;
}

static handle_t *handle_for(const char *uuid) {
    for (handle_t *h = handles; h; h = h->next)
        if (h->epoch == epoch && !strcmp(h->uuid, uuid)) return h;
    handle_t *h = calloc(1, sizeof *h);
    if (!h) return NULL;
    h->epoch = epoch;
    text(h->uuid, sizeof h->uuid, uuid);
    h->next = handles;
    return handles = h;
}

static ret_t give_handle(const char *uuid, void **out) {
    if (!out) return INVALID_ARGUMENT;
    handle_t *h = handle_for(uuid);
    if (!h) return MEMORY_ERROR;
    *out = h;
    return OK;
}

typedef struct { gpu_rec *gpu; mig_rec *mig; unsigned index; } device_t;

static bool find_uuid(const char *uuid, device_t *d) {
    for (unsigned i = 0; i < machine->gpus_n; i++) {
        gpu_rec *g = &machine->gpus[i];
        *d = (device_t){g, NULL, i};
        if (!strcmp(g->uuid, uuid)) return true;
        for (size_t k = 0; g->mig_mode == 1 && k < g->migs_n; k++)
            if (!strcmp(g->migs[k].uuid, uuid)) {
                d->mig = &g->migs[k];
                return true;
            }
    }
    return false;
}

/* The device behind a handle.  A MIG device that was destroyed, or a handle of another initialisation, is an
 * invalid argument. */
static ret_t resolve(void *handle, device_t *d) {
    for (handle_t *h = handles; h; h = h->next)
        if (h == handle) {
            if (h->epoch != epoch || !find_uuid(h->uuid, d)) return INVALID_ARGUMENT;
            return d->gpu->lost ? GPU_IS_LOST : OK;
        }
    return INVALID_ARGUMENT;
}

/* The answer that the file prescribes for one function of one GPU, given without the common prefix:
 * "PowerUsage" for nvmlDeviceGetPowerUsage, "RegisterEvents" for nvmlDeviceRegisterEvents. */
static ret_t prescribed(const gpu_rec *g, const char *function) {
    for (size_t i = 0; i < g->answers_n; i++)
        if (!strcmp(g->answers[i].function, function)) return g->answers[i].code;
    return OK;
}

enum { WHOLE_GPU = 1, OR_MIG = 2 };

/* Begins a query of a device: lock, validity, loss, a prescribed answer, and whether MIG devices have it. */
static ret_t begin(void *handle, const char *function, int kinds, device_t *d) {
    ret_t r = enter();
    if (r == OK) r = resolve(handle, d);
    if (r == OK) r = prescribed(d->gpu, function);
    if (r == OK && d->mig && !(kinds & OR_MIG)) r = NOT_SUPPORTED;
    return r;
}

static ret_t put_text(const char *value, char *out, unsigned length) {
    if (!out) return INVALID_ARGUMENT;
    size_t n = strlen(value) + 1;
    if (n > length) return INSUFFICIENT_SIZE;
    memcpy(out, value, n);
    return OK;
}

static bool alive(unsigned pid) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%u", pid);
    return !access(path, F_OK);
}

/* Whether a process is (still) on the device: with `reap`, a PID that is gone has left the GPU, as for a real one. */
static bool is_on(const process_rec *p, const device_t *d) {
    if (d->mig && (p->gi != d->mig->gi || p->ci != d->mig->ci)) return false;
    return !machine->reap || alive(p->pid);
}

static unsigned long long used_memory(const device_t *d) {
    long long told = d->mig ? d->mig->used : d->gpu->used;
    if (told >= 0) return (unsigned long long)told;
    unsigned long long sum = 0;
    for (size_t i = 0; i < d->gpu->processes_n; i++) {
        const process_rec *p = &d->gpu->processes[i];
        if (p->memory != NO_MEMORY_VALUE && is_on(p, d)) sum += p->memory;
    }
    return sum;
}

static unsigned long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (unsigned long long)t.tv_sec * 1000000ULL + (unsigned long long)t.tv_nsec / 1000;
}

/* ------------------------------------------------------------------ library and system */

API ret_t nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    if (init_count) { /* counted: a further initialisation changes nothing, also after the driver went */
        init_count++;
        return leave(OK);
    }
    refresh();
    if (machine_bad) return leave(UNKNOWN);
    if (!machine || machine->driver == DRIVER_ABSENT) return leave(DRIVER_NOT_LOADED);
    if (machine->driver == DRIVER_MISMATCH) return leave(LIB_RM_VERSION_MISMATCH);
    init_count = 1;
    epoch++;
    generation = machine->generation;
    detached = false;
    return leave(OK);
}
API ret_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
API ret_t nvmlInit(void) { return nvmlInitWithFlags(0); }

API ret_t nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    if (!init_count) return leave(UNINITIALIZED);
    init_count--;
    return leave(OK);
}

API const char *nvmlErrorString(ret_t code) {
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 5: return "Already Initialized";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case 8: return "Insufficient External Power";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case 11: return "Interrupt Request Issue";
    case 12: return "NVML Shared Library Not Found";
    case 13: return "Function Not Found";
    case 14: return "Corrupted infoROM";
    case GPU_IS_LOST: return "GPU is lost";
    case 16: return "GPU requires restart";
    case 17: return "The operating system has blocked the request.";
    case LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
    case 19: return "In use by another client";
    case MEMORY_ERROR: return "Insufficient Memory";
    case 21: return "No data";
    case ARGUMENT_VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

API ret_t nvmlSystemGetDriverVersion(char *out, unsigned length) {
    ret_t r = enter();
    return leave(r ? r : put_text(machine->driver_version, out, length));
}
API ret_t nvmlSystemGetNVMLVersion(char *out, unsigned length) {
    ret_t r = enter();
    return leave(r ? r : put_text(machine->nvml_version, out, length));
}
API ret_t nvmlSystemGetCudaDriverVersion_v2(int *out) {
    ret_t r = enter();
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) *out = machine->cuda;
    return leave(r);
}
API ret_t nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }

/* The name that the file gives a process, or the first word of a real one's command line. */
API ret_t nvmlSystemGetProcessName(unsigned pid, char *out, unsigned length) {
    ret_t r = enter();
    if (r) return leave(r);
    for (size_t i = 0; i < machine->gpus_n; i++)
        for (size_t k = 0; k < machine->gpus[i].processes_n; k++) {
            const process_rec *p = &machine->gpus[i].processes[k];
            if (p->pid == pid && *p->name && (!machine->reap || alive(pid))) return leave(put_text(p->name, out, length));
        }
    char path[48], name[1024];
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return leave(NOT_FOUND);
    ssize_t n = read(fd, name, sizeof name - 1);
    close(fd);
    if (n <= 0) return leave(NOT_FOUND);
    name[n] = 0;
    return leave(put_text(name, out, length));
}

/* ------------------------------------------------------------------ devices: handles and identity */

API ret_t nvmlDeviceGetCount_v2(unsigned *out) {
    ret_t r = enter();
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) *out = (unsigned)machine->gpus_n;
    return leave(r);
}

API ret_t nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    ret_t r = enter();
    if (r) return leave(r);
    if (index >= machine->gpus_n) return leave(INVALID_ARGUMENT);
    gpu_rec *g = &machine->gpus[index];
    if (g->lost && machine->lost_handle_fails) return leave(GPU_IS_LOST);
    r = prescribed(g, "HandleByIndex");
    return leave(r ? r : give_handle(g->uuid, out));
}

API ret_t nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    ret_t r = enter();
    if (r) return leave(r);
    if (!uuid) return leave(INVALID_ARGUMENT);
    device_t d;
    if (!find_uuid(uuid, &d)) return leave(NOT_FOUND);
    return leave(d.gpu->lost ? GPU_IS_LOST : give_handle(uuid, out));
}

static bool parse_pci(const char *s, unsigned part[3]) {
    unsigned function = 0;
    part[0] = 0;
    if (sscanf(s, "%x:%x:%x.%x", &part[0], &part[1], &part[2], &function) == 4) return function == 0;
    part[0] = 0;
    return sscanf(s, "%x:%x.%x", &part[1], &part[2], &function) == 3 && function == 0;
}

API ret_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **out) {
    ret_t r = enter();
    if (r) return leave(r);
    unsigned want[3], have[3];
    if (!bus_id || !parse_pci(bus_id, want)) return leave(INVALID_ARGUMENT);
    for (size_t i = 0; i < machine->gpus_n; i++) {
        gpu_rec *g = &machine->gpus[i];
        if (parse_pci(g->pci, have) && !memcmp(want, have, sizeof want))
            return leave(g->lost ? GPU_IS_LOST : give_handle(g->uuid, out));
    }
    return leave(NOT_FOUND);
}

API ret_t nvmlDeviceGetUUID(void *h, char *out, unsigned length) {
    device_t d;
    ret_t r = begin(h, "UUID", OR_MIG, &d);
    return leave(r ? r : put_text(d.mig ? d.mig->uuid : d.gpu->uuid, out, length));
}

/* A MIG device's name is its GPU's with its profile: "NVIDIA A100-SXM4-40GB MIG 1g.5gb". */
API ret_t nvmlDeviceGetName(void *h, char *out, unsigned length) {
    device_t d;
    ret_t r = begin(h, "Name", OR_MIG, &d);
    if (r) return leave(r);
    char name[160];
    if (d.mig) snprintf(name, sizeof name, "%s MIG %s", d.gpu->name, d.mig->profile);
    else snprintf(name, sizeof name, "%s", d.gpu->name);
    return leave(put_text(name, out, length));
}

API ret_t nvmlDeviceGetSerial(void *h, char *out, unsigned length) {
    device_t d;
    ret_t r = begin(h, "Serial", WHOLE_GPU, &d);
    if (r == OK && !*d.gpu->serial) r = NOT_SUPPORTED;
    return leave(r ? r : put_text(d.gpu->serial, out, length));
}

/* Most queries give one number: write it or say why not. */
#define NUMBER(function, type, kinds, condition, expression)                     \
    API ret_t nvmlDeviceGet##function(void *h, type *out) {                      \
        device_t d;                                                              \
        ret_t r = begin(h, #function, kinds, &d);                                \
        if (r == OK && !out) r = INVALID_ARGUMENT;                               \
        if (r == OK && !(condition)) r = NOT_SUPPORTED;                          \
        if (r == OK) *out = (type)(expression);                                  \
        return leave(r);                                                         \
    }

NUMBER(Index, unsigned, WHOLE_GPU | OR_MIG, true, d.mig ? d.mig->slot : d.index)
NUMBER(MinorNumber, unsigned, WHOLE_GPU, true, d.gpu->minor)
NUMBER(PowerUsage, unsigned, WHOLE_GPU, true, d.gpu->power)
NUMBER(EnforcedPowerLimit, unsigned, WHOLE_GPU, true, d.gpu->power_limit)
NUMBER(PowerManagementLimit, unsigned, WHOLE_GPU, true, d.gpu->power_limit)
NUMBER(TotalEnergyConsumption, unsigned long long, WHOLE_GPU, true, d.gpu->energy)
NUMBER(ComputeMode, unsigned, WHOLE_GPU, true, d.gpu->compute_mode)
NUMBER(PersistenceMode, unsigned, WHOLE_GPU, true, d.gpu->persistence)
/* Of platforms on which the GPU's own memory is a NUMA node; everywhere else it is not supported. */
NUMBER(NumaNodeId, unsigned, WHOLE_GPU, d.gpu->own_numa >= 0, d.gpu->own_numa)
NUMBER(MaxMigDeviceCount, unsigned, WHOLE_GPU, true, d.gpu->mig_mode == 1 ? d.gpu->mig_max : 0)
NUMBER(GpuInstanceId, unsigned, WHOLE_GPU | OR_MIG, d.mig, d.mig->gi)
NUMBER(ComputeInstanceId, unsigned, WHOLE_GPU | OR_MIG, d.mig, d.mig->ci)

static void put_pci(const char *id, unsigned device_id, unsigned subsystem_id, pci_info_t *out) {
    unsigned part[3] = {0, 0, 0};
    memset(out, 0, sizeof *out);
    parse_pci(id, part);
    out->domain = part[0];
    out->bus = part[1];
    out->device = part[2];
    out->device_id = device_id;
    out->subsystem_id = subsystem_id;
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", part[0], part[1], part[2]);
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "%04X:%02X:%02X.0", part[0] & 0xFFFF, part[1] & 0xFF, part[2] & 0xFF);
}

API ret_t nvmlDeviceGetPciInfo_v3(void *h, pci_info_t *out) {
    device_t d;
    ret_t r = begin(h, "PciInfo", WHOLE_GPU, &d);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) put_pci(d.gpu->pci, d.gpu->device_id, d.gpu->subsystem_id, out);
    return leave(r);
}

API ret_t nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) {
    device_t d;
    ret_t r = begin(h, "CudaComputeCapability", OR_MIG, &d);
    if (r == OK && (!major || !minor)) r = INVALID_ARGUMENT;
    if (r == OK) *major = d.gpu->cc_major, *minor = d.gpu->cc_minor;
    return leave(r);
}

/* ------------------------------------------------------------------ devices: metrics */

static void memory_of(const device_t *d, memory_v2_t *out) {
    out->total = d->mig ? d->mig->memory : d->gpu->total;
    out->reserved = d->mig ? 0 : d->gpu->reserved;
    out->used = used_memory(d);
    unsigned long long taken = out->reserved + out->used;
    out->free = taken < out->total ? out->total - taken : 0;
}

/* Version 1 counts what the driver reserved as used; version 2 tells it apart. */
API ret_t nvmlDeviceGetMemoryInfo(void *h, memory_t *out) {
    device_t d;
    memory_v2_t m;
    ret_t r = begin(h, "MemoryInfo", OR_MIG, &d);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) {
        memory_of(&d, &m);
        *out = (memory_t){m.total, m.free, m.total - m.free};
    }
    return leave(r);
}

API ret_t nvmlDeviceGetMemoryInfo_v2(void *h, memory_v2_t *out) {
    device_t d;
    ret_t r = begin(h, "MemoryInfo_v2", OR_MIG, &d);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK && out->version != VERSION_WORD(memory_v2_t, 2)) r = ARGUMENT_VERSION_MISMATCH;
    if (r == OK) memory_of(&d, out);
    return leave(r);
}

API ret_t nvmlDeviceGetUtilizationRates(void *h, utilization_t *out) {
    device_t d;
    ret_t r = begin(h, "UtilizationRates", WHOLE_GPU, &d);
    if (r == OK && d.gpu->mig_mode == 1) r = NOT_SUPPORTED;
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) *out = (utilization_t){d.gpu->util_gpu, d.gpu->util_memory};
    return leave(r);
}

API ret_t nvmlDeviceGetTemperature(void *h, unsigned sensor, unsigned *out) {
    device_t d;
    ret_t r = begin(h, "Temperature", WHOLE_GPU, &d);
    if (r == OK && (sensor != 0 || !out)) r = INVALID_ARGUMENT;
    if (r == OK) *out = d.gpu->temperature;
    return leave(r);
}

API ret_t nvmlDeviceGetTemperatureV(void *h, temperature_v1_t *out) {
    device_t d;
    ret_t r = begin(h, "Temperature", WHOLE_GPU, &d);
    if (r == OK && (!out || out->sensor != 0)) r = INVALID_ARGUMENT;
    if (r == OK && out->version != VERSION_WORD(temperature_v1_t, 1)) r = ARGUMENT_VERSION_MISMATCH;
    if (r == OK) out->celsius = (int)d.gpu->temperature;
    return leave(r);
}

API ret_t nvmlDeviceGetEccMode(void *h, unsigned *current, unsigned *pending) {
    device_t d;
    ret_t r = begin(h, "EccMode", WHOLE_GPU, &d);
    if (r == OK && (!current || !pending)) r = INVALID_ARGUMENT;
    if (r == OK && d.gpu->ecc_mode < 0) r = NOT_SUPPORTED;
    if (r == OK) *current = *pending = (unsigned)d.gpu->ecc_mode;
    return leave(r);
}

API ret_t nvmlDeviceGetTotalEccErrors(void *h, unsigned error, unsigned counter, unsigned long long *out) {
    device_t d;
    ret_t r = begin(h, "TotalEccErrors", WHOLE_GPU, &d);
    if (r == OK && (error > 1 || counter > 1 || !out)) r = INVALID_ARGUMENT;
    if (r == OK && d.gpu->ecc_mode != 1) r = NOT_SUPPORTED;
    if (r == OK) *out = d.gpu->ecc[error][counter];
    return leave(r);
}

#define FI_TOTAL_ENERGY_CONSUMPTION 83
#define FI_NVLINK_LINK_COUNT 91
#define VALUE_UNSIGNED_INT 1
#define VALUE_UNSIGNED_LONG_LONG 3

/* The call succeeds; each field has its own result. */
API ret_t nvmlDeviceGetFieldValues(void *h, int count, field_value_t *values) {
    device_t d;
    ret_t r = begin(h, "FieldValues", WHOLE_GPU, &d);
    if (r == OK && (count < 1 || !values)) r = INVALID_ARGUMENT;
    for (int i = 0; r == OK && i < count; i++) {
        field_value_t *v = &values[i];
        v->timestamp = (long long)now_us();
        v->latency_us = 0;
        v->result = NOT_SUPPORTED;
        if (v->field == FI_TOTAL_ENERGY_CONSUMPTION) {
            v->result = prescribed(d.gpu, "TotalEnergyConsumption");
            v->type = VALUE_UNSIGNED_LONG_LONG;
            v->value.ull = d.gpu->energy;
        } else if (v->field == FI_NVLINK_LINK_COUNT && d.gpu->links_n) {
            v->result = OK;
            v->type = VALUE_UNSIGNED_INT;
            v->value.u = (unsigned)d.gpu->links_n;
        }
    }
    return leave(r);
}

/* ------------------------------------------------------------------ devices: processes */

/* Without room the number is told and INSUFFICIENT_SIZE answered; without processes the answer is success. */
static ret_t processes(void *h, const char *function, char kind, unsigned *count, process_info_t *out) {
    device_t d;
    ret_t r = begin(h, function, OR_MIG, &d);
    if (r == OK && !count) r = INVALID_ARGUMENT;
    if (r) return leave(r);
    unsigned room = out ? *count : 0, n = 0;
    bool mig = d.gpu->mig_mode == 1;
    for (size_t i = 0; i < d.gpu->processes_n; i++) {
        const process_rec *p = &d.gpu->processes[i];
        if (p->kind != kind || !is_on(p, &d)) continue;
        if (n < room)
            out[n] = (process_info_t){p->pid, p->memory, mig ? p->gi : NO_INSTANCE, mig ? p->ci : NO_INSTANCE};
        n++;
    }
    *count = n;
    return leave(n > room ? INSUFFICIENT_SIZE : OK);
}

#define MAX_FIRST 256 /* processes of one list in the first version */

/* The first version has no instances: 16 bytes for each process. */
static ret_t first_processes(void *h, const char *function, char kind, unsigned *count, process_info_v1_t *out) {
    process_info_t all[MAX_FIRST];
    if (out && *count > MAX_FIRST) *count = MAX_FIRST;
    ret_t r = processes(h, function, kind, count, out ? all : NULL);
    for (unsigned i = 0; out && r == OK && i < *count; i++)
        out[i] = (process_info_v1_t){all[i].pid, all[i].memory};
    return r;
}

#define PROCESSES(name, kind)                                                                                   \
    API ret_t nvmlDeviceGet##name(void *h, unsigned *count, process_info_v1_t *out) {                           \
        return first_processes(h, #name, kind, count, out);                                                     \
    }                                                                                                           \
    API ret_t nvmlDeviceGet##name##_v3(void *h, unsigned *count, process_info_t *out) {                         \
        return processes(h, #name, kind, count, out);                                                           \
    }                                                                                                           \
    API ret_t nvmlDeviceGet##name##_v2(void *h, unsigned *count, process_info_t *out) {                         \
        return processes(h, #name, kind, count, out);                                                           \
    }
PROCESSES(ComputeRunningProcesses, 'c')
PROCESSES(GraphicsRunningProcesses, 'g')
PROCESSES(MPSComputeRunningProcesses, 'm')

API ret_t nvmlDeviceGetProcessUtilization(void *h, sample_t *out, unsigned *count, unsigned long long last_seen) {
    device_t d;
    ret_t r = begin(h, "ProcessUtilization", WHOLE_GPU, &d);
    if (r == OK && d.gpu->mig_mode == 1) r = NOT_SUPPORTED;
    if (r == OK && !count) r = INVALID_ARGUMENT;
    if (r) return leave(r);
    unsigned room = out ? *count : 0, n = 0;
    for (size_t i = 0; i < d.gpu->samples_n; i++) {
        sample_t s = d.gpu->samples[i];
        if (!s.timestamp) s.timestamp = now_us(); /* "just now", whenever it is asked */
        if (s.timestamp <= last_seen || (machine->reap && !alive(s.pid))) continue;
        if (n < room) out[n] = s;
        n++;
    }
    *count = n;
    if (!n) return leave(NOT_FOUND);
    return leave(n > room ? INSUFFICIENT_SIZE : OK);
}

/* ------------------------------------------------------------------ MIG */

API ret_t nvmlDeviceGetMigMode(void *h, unsigned *current, unsigned *pending) {
    device_t d;
    ret_t r = begin(h, "MigMode", WHOLE_GPU, &d);
    if (r == OK && (!current || !pending)) r = INVALID_ARGUMENT;
    if (r == OK && d.gpu->mig_mode < 0) r = NOT_SUPPORTED;
    if (r == OK) *current = (unsigned)d.gpu->mig_mode, *pending = (unsigned)d.gpu->mig_pending;
    return leave(r);
}

API ret_t nvmlDeviceGetMigDeviceHandleByIndex(void *h, unsigned slot, void **out) {
    device_t d;
    ret_t r = begin(h, "MigDeviceHandleByIndex", WHOLE_GPU, &d);
    if (r) return leave(r);
    if (d.gpu->mig_mode != 1) return leave(NOT_SUPPORTED);
    if (slot >= d.gpu->mig_max) return leave(INVALID_ARGUMENT);
    for (size_t i = 0; i < d.gpu->migs_n; i++)
        if (d.gpu->migs[i].slot == slot) return leave(give_handle(d.gpu->migs[i].uuid, out));
    return leave(NOT_FOUND);
}

API ret_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *h, void **out) {
    device_t d;
    ret_t r = begin(h, "DeviceHandleFromMigDeviceHandle", OR_MIG, &d);
    if (r == OK && !d.mig) r = INVALID_ARGUMENT;
    return leave(r ? r : give_handle(d.gpu->uuid, out));
}

API ret_t nvmlDeviceGetAttributes_v2(void *h, attributes_t *out) {
    device_t d;
    ret_t r = begin(h, "Attributes", OR_MIG, &d);
    if (r == OK && (!d.mig || !out)) r = INVALID_ARGUMENT; /* documented as of MIG devices only */
    if (r == OK) {
        memset(out, 0, sizeof *out);
        out->sm_count = d.mig->sm_count;
        out->copy_engines = d.mig->gi_slices;
        out->gi_slices = d.mig->gi_slices;
        out->ci_slices = d.mig->ci_slices;
        out->memory_mib = d.mig->memory >> 20;
    }
    return leave(r);
}

API ret_t nvmlDeviceIsMigDeviceHandle(void *h, unsigned *out) {
    device_t d;
    ret_t r = begin(h, "IsMigDeviceHandle", OR_MIG, &d);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) *out = d.mig != NULL;
    return leave(r);
}

/* ------------------------------------------------------------------ topology */

#define LEVEL_INTERNAL 0
#define LEVEL_HOSTBRIDGE 30
#define LEVEL_SYSTEM 50

static unsigned level_between(unsigned a, unsigned b) {
    if (a == b) return LEVEL_INTERNAL;
    for (size_t i = 0; i < machine->levels_n; i++) {
        const level_rec *l = &machine->levels[i];
        if ((l->a == a && l->b == b) || (l->a == b && l->b == a)) return l->level;
    }
    return LEVEL_SYSTEM;
}

/* A link to a GPU that is lost is down. */
static bool link_up(const link_rec *l) { return l->active && (l->peer < 0 || !machine->gpus[l->peer].lost); }

/* Whether NVLink joins two GPUs: directly, or both into one switch. */
static bool nvlinked(const gpu_rec *a, unsigned b) {
    for (size_t i = 0; i < a->links_n; i++) {
        const link_rec *l = &a->links[i];
        if (!link_up(l)) continue;
        if (l->peer == (int)b) return true;
        const gpu_rec *other = &machine->gpus[b];
        for (size_t k = 0; l->peer < 0 && k < other->links_n; k++)
            if (other->links[k].peer < 0 && link_up(&other->links[k]) && !strcmp(other->links[k].pci, l->pci)) return true;
    }
    return false;
}

static ret_t begin_pair(void *h1, void *h2, const char *function, device_t *a, device_t *b) {
    ret_t r = begin(h1, function, WHOLE_GPU, a);
    if (r == OK) r = resolve(h2, b);
    if (r == OK && b->mig) r = NOT_SUPPORTED;
    return r;
}

API ret_t nvmlDeviceGetTopologyCommonAncestor(void *h1, void *h2, unsigned *out) {
    device_t a, b;
    ret_t r = begin_pair(h1, h2, "TopologyCommonAncestor", &a, &b);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) *out = level_between(a.index, b.index);
    return leave(r);
}

/* The GPUs at exactly this level.  Unlike process lists, the probe without room answers success. */
API ret_t nvmlDeviceGetTopologyNearestGpus(void *h, unsigned level, unsigned *count, void **out) {
    device_t d;
    ret_t r = begin(h, "TopologyNearestGpus", WHOLE_GPU, &d);
    if (r == OK && !count) r = INVALID_ARGUMENT;
    if (r) return leave(r);
    unsigned room = out ? *count : 0, n = 0;
    for (unsigned i = 0; i < machine->gpus_n; i++) {
        if (i == d.index || machine->gpus[i].lost || level_between(d.index, i) != level) continue;
        if (n < room && (r = give_handle(machine->gpus[i].uuid, &out[n]))) return leave(r);
        n++;
    }
    *count = out && n > room ? room : n;
    return leave(OK);
}

#define P2P_NVLINK 2
#define P2P_UNKNOWN_INDEX 5
#define P2P_OK 0
#define P2P_GPU_NOT_SUPPORTED 2
#define P2P_IOH_TOPOLOGY_NOT_SUPPORTED 3
#define P2P_NOT_SUPPORTED 5

API ret_t nvmlDeviceGetP2PStatus(void *h1, void *h2, unsigned index, unsigned *out) {
    device_t a, b;
    ret_t r = begin_pair(h1, h2, "P2PStatus", &a, &b);
    if (r == OK && (!out || index >= P2P_UNKNOWN_INDEX || a.index == b.index)) r = INVALID_ARGUMENT;
    if (r) return leave(r);
    bool linked = nvlinked(a.gpu, b.index);
    if (index == P2P_NVLINK) *out = linked ? P2P_OK : P2P_NOT_SUPPORTED;
    else if (linked) *out = P2P_OK;
    else if (!a.gpu->p2p || !b.gpu->p2p) *out = P2P_GPU_NOT_SUPPORTED;
    else *out = level_between(a.index, b.index) <= LEVEL_HOSTBRIDGE ? P2P_OK : P2P_IOH_TOPOLOGY_NOT_SUPPORTED;
    return leave(OK);
}

/* Finds a link.  A card without NVLink does not support the question; one with it has no such link. */
static ret_t begin_link(void *h, const char *function, unsigned number, link_rec **out) {
    device_t d;
    ret_t r = begin(h, function, WHOLE_GPU, &d);
    if (r) return r;
    if (number >= MAX_LINKS) return INVALID_ARGUMENT;
    if (!d.gpu->links_n) return NOT_SUPPORTED;
    for (size_t i = 0; i < d.gpu->links_n; i++)
        if (d.gpu->links[i].number == number) {
            *out = &d.gpu->links[i];
            return OK;
        }
    return INVALID_ARGUMENT;
}

API ret_t nvmlDeviceGetNvLinkState(void *h, unsigned number, unsigned *out) {
    link_rec *l;
    ret_t r = begin_link(h, "NvLinkState", number, &l);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) *out = link_up(l);
    return leave(r);
}

API ret_t nvmlDeviceGetNvLinkRemotePciInfo_v2(void *h, unsigned number, pci_info_t *out) {
    link_rec *l;
    ret_t r = begin_link(h, "NvLinkRemotePciInfo", number, &l);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK && !link_up(l)) r = NOT_SUPPORTED;
    if (r) return leave(r);
    if (l->peer < 0) put_pci(l->pci, 0, 0, out);
    else put_pci(machine->gpus[l->peer].pci, machine->gpus[l->peer].device_id, machine->gpus[l->peer].subsystem_id, out);
    return leave(OK);
}

#define LINKS_TO_GPU 0
#define LINKS_TO_SWITCH 2

API ret_t nvmlDeviceGetNvLinkRemoteDeviceType(void *h, unsigned number, unsigned *out) {
    link_rec *l;
    ret_t r = begin_link(h, "NvLinkRemoteDeviceType", number, &l);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK && !link_up(l)) r = NOT_SUPPORTED;
    if (r == OK) *out = l->peer < 0 ? LINKS_TO_SWITCH : LINKS_TO_GPU;
    return leave(r);
}

static void set_bit(unsigned long *set, unsigned size, unsigned bit) {
    if (bit / ULONG_BITS < size) set[bit / ULONG_BITS] |= 1UL << (bit % ULONG_BITS);
}

/* Sets the CPUs of a list such as "0-15,32-47"; what lies beyond the caller's set is left out. */
static ret_t put_cpus(const char *list, unsigned size, unsigned long *set) {
    if (!size || !set) return INVALID_ARGUMENT;
    if (!*list) return NOT_SUPPORTED;
    memset(set, 0, size * sizeof *set);
    for (const char *s = list; *s;) {
        unsigned from, to;
        int used = 0;
        if (sscanf(s, "%u%n", &from, &used) != 1) return UNKNOWN;
        s += used;
        to = from;
        if (*s == '-') {
            if (sscanf(s + 1, "%u%n", &to, &used) != 1) return UNKNOWN;
            s += 1 + used;
        }
        if (to >= MAX_CPUS) return UNKNOWN;
        for (; from <= to; from++) set_bit(set, size, from);
        if (*s == ',') s++;
    }
    return OK;
}

API ret_t nvmlDeviceGetCpuAffinity(void *h, unsigned size, unsigned long *set) {
    device_t d;
    ret_t r = begin(h, "CpuAffinity", WHOLE_GPU, &d);
    return leave(r ? r : put_cpus(d.gpu->cpus, size, set));
}

API ret_t nvmlDeviceGetCpuAffinityWithinScope(void *h, unsigned size, unsigned long *set, unsigned scope) {
    device_t d;
    ret_t r = begin(h, "CpuAffinityWithinScope", WHOLE_GPU, &d);
    if (r == OK && scope > 1) r = INVALID_ARGUMENT;
    return leave(r ? r : put_cpus(d.gpu->cpus, size, set));
}

API ret_t nvmlDeviceGetMemoryAffinity(void *h, unsigned size, unsigned long *set, unsigned scope) {
    device_t d;
    ret_t r = begin(h, "MemoryAffinity", WHOLE_GPU, &d);
    if (r == OK && (!size || !set || scope > 1)) r = INVALID_ARGUMENT;
    if (r == OK && d.gpu->numa < 0) r = NOT_SUPPORTED;
    if (r == OK) {
        memset(set, 0, size * sizeof *set);
        set_bit(set, size, (unsigned)d.gpu->numa);
    }
    return leave(r);
}

/* ------------------------------------------------------------------ events */

#define EVENTS_SUPPORTED 0x1FULL /* single and double bit ECC errors, performance state, XID, clocks */
#define WAIT_STEP_NS 20000000L

API ret_t nvmlDeviceGetSupportedEventTypes(void *h, unsigned long long *out) {
    device_t d;
    ret_t r = begin(h, "SupportedEventTypes", WHOLE_GPU, &d);
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r == OK) *out = d.gpu->ecc_mode == 1 ? EVENTS_SUPPORTED : EVENTS_SUPPORTED & ~0x3ULL;
    return leave(r);
}

API ret_t nvmlEventSetCreate(void **out) {
    ret_t r = enter();
    if (r == OK && !out) r = INVALID_ARGUMENT;
    if (r) return leave(r);
    event_set_t *s = calloc(1, sizeof *s);
    if (!s) return leave(MEMORY_ERROR);
    s->live = true;
    s->epoch = epoch;
    s->next = event_sets;
    *out = event_sets = s;
    return leave(OK);
}

/* Sets are kept after they were freed, so that a waiter in another thread finds a dead one, not freed memory. */
static event_set_t *live_set(void *set) {
    for (event_set_t *s = event_sets; s; s = s->next)
        if (s == set) return s->live && s->epoch == epoch ? s : NULL;
    return NULL;
}

API ret_t nvmlEventSetFree(void *set) {
    pthread_mutex_lock(&lock); /* also allowed when the driver is gone */
    if (!init_count) return leave(UNINITIALIZED);
    event_set_t *s = live_set(set);
    if (!s) return leave(INVALID_ARGUMENT);
    s->live = false;
    free(s->registrations);
    s->registrations = NULL;
    s->registrations_n = 0;
    return leave(OK);
}

/* What happened before the registration is not told. */
API ret_t nvmlDeviceRegisterEvents(void *h, unsigned long long types, void *set) {
    device_t d;
    ret_t r = begin(h, "RegisterEvents", WHOLE_GPU, &d);
    if (r) return leave(r);
    event_set_t *s = live_set(set);
    if (!s) return leave(INVALID_ARGUMENT);
    if (types & ~(d.gpu->ecc_mode == 1 ? EVENTS_SUPPORTED : EVENTS_SUPPORTED & ~0x3ULL)) return leave(NOT_SUPPORTED);
    for (size_t i = 0; i < s->registrations_n; i++)
        if (!strcmp(s->registrations[i].uuid, d.gpu->uuid)) {
            s->registrations[i].types |= types;
            return leave(OK);
        }
    registration_t *g = append(&s->registrations, &s->registrations_n, sizeof *g);
    if (!g) return leave(MEMORY_ERROR);
    text(g->uuid, sizeof g->uuid, d.gpu->uuid);
    g->types = types;
    for (size_t i = 0; i < machine->events_n; i++)
        if (machine->events[i].gpu == d.index && machine->events[i].sequence > g->seen) g->seen = machine->events[i].sequence;
    return leave(OK);
}

/* Gives the set's oldest event that it has not given yet.  OK, TIMEOUT when there is none, GPU_IS_LOST. */
static ret_t next_event(event_set_t *s, event_data_t *out) {
    const event_rec *best = NULL;
    registration_t *by = NULL;
    bool lost = false;
    for (size_t i = 0; i < s->registrations_n; i++) {
        registration_t *g = &s->registrations[i];
        device_t d;
        if (!find_uuid(g->uuid, &d)) continue;
        lost |= d.gpu->lost;
        for (size_t k = 0; k < machine->events_n; k++) {
            const event_rec *e = &machine->events[k];
            if (e->gpu == d.index && e->sequence > g->seen && (e->type & g->types) && (!best || e->sequence < best->sequence))
                best = e, by = g;
        }
    }
    if (!best) return lost && machine->lost_wait_fails ? GPU_IS_LOST : TIMEOUT;
    by->seen = best->sequence;
    *out = (event_data_t){NULL, best->type, best->data, best->gi, best->ci};
    return give_handle(by->uuid, &out->device);
}

static long long monotonic_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000000000LL + t.tv_nsec;
}

API ret_t nvmlEventSetWait_v2(void *set, event_data_t *out, unsigned timeout_ms) {
    long long end = monotonic_ns() + timeout_ms * 1000000LL;
    for (;;) {
        ret_t r = enter();
        event_set_t *s = live_set(set);
        if (r == OK && (!s || !out)) r = INVALID_ARGUMENT;
        if (r == OK) r = next_event(s, out);
        leave(r);
        if (r != TIMEOUT) return r;
        long long left = end - monotonic_ns();
        if (left <= 0) return TIMEOUT;
        long step = left < WAIT_STEP_NS ? (long)left : WAIT_STEP_NS;
        nanosleep(&(struct timespec){0, step}, NULL);
    }
}
