/* A libnvidia-ml.so.1 whose GPUs a test describes in a file and changes while others read them.
 *
 * EVERSTEP_TEST_GPUS names a folder. The GPUs of this process are in FOLDER/WHO.state, its events in FOLDER/WHO.events,
 * where WHO is the last argument of the process' command line if such a file exists, else "gpus".
 * state: lines "GPU KEY VALUE", GPU being a number or *; the last line that fits counts. Keys: see the calls below, and
 *   count, driver_down, left_out (a GPU that is no longer listed): of all (*); lost, reset_required, unknown_error: every call about the GPU fails so;
 *   hang: the name of a call that does not return while the line is there.
 * events: lines "GPU XID", appended.
 * Declarations are our own: only what is used, with the names, numbers and layouts of the published interface.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15,
       RESET_REQUIRED = 16, UNKNOWN = 999 };
enum { MAX_GPUS = 16, LINKS = 18, POLL_US = 5000 };
enum { XID_EVENTS = 8, RECOVERY_ACTION = 230, LINK_CRC_FLIT = 38, LINK_CRC_DATA = 45, LINK_REPLAY = 52,
       LINK_RECOVERY = 59, UNSIGNED_LONG_LONG = 3 };

typedef int Return;
typedef unsigned long long u64;
typedef struct Gpu { unsigned int index; } *Device;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned int field, scope; long long timestamp, latency_us; int type; Return result; u64 value; } Field;
typedef struct { Device device; u64 type, data; unsigned int gpu_instance, compute_instance; } Event;
typedef struct Set { int watched[MAX_GPUS]; long offset; } *EventSet;

static struct Gpu gpus[MAX_GPUS];

static void find(const char *suffix, char *path) {
    const char *folder = getenv("EVERSTEP_TEST_GPUS");
    char words[8192];
    FILE *file = fopen("/proc/self/cmdline", "r");
    size_t size = file ? fread(words, 1, sizeof words - 1, file) : 0;
    if (file)
        fclose(file);
    words[size] = 0;
    const char *last = words;
    for (size_t i = 0; i + 1 < size; i++)
        if (!words[i])
            last = words + i + 1;
    snprintf(path, PATH_MAX, "%s/%.200s.state", folder ? folder : "", strchr(last, '/') ? "" : last);
    int mine = access(path, R_OK) == 0;
    snprintf(path, PATH_MAX, "%s/%.200s%s", folder ? folder : "", mine ? last : "gpus", suffix);
}

/* The text of a key, "" if there is none. */
static void text_of(int gpu, const char *key, char value[128]) {
    char path[PATH_MAX], line[256], who[16], name[64], text[128];
    find(".state", path);
    value[0] = 0;
    FILE *file = fopen(path, "r");
    if (!file)
        return;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%15s %63s %127s", who, name, text) == 3 && !strcmp(name, key) &&
            (!strcmp(who, "*") || (gpu >= 0 && atoi(who) == gpu)))
            strcpy(value, text);
    fclose(file);
}

static u64 number_of(int gpu, const char *key, u64 otherwise) {
    char value[128];
    text_of(gpu, key, value);
    return value[0] ? strtoull(value, NULL, 0) : otherwise;
}

static void hang(int gpu, const char *call) {
    char value[128];
    for (;;) {
        text_of(gpu, "hang", value);
        if (strcmp(value, call))
            return;
        usleep(POLL_US);
    }
}

static Return enter(Device device, const char *call) {
    hang((int)device->index, call);
    if (number_of((int)device->index, "lost", 0))
        return GPU_IS_LOST;
    if (number_of((int)device->index, "reset_required", 0))
        return RESET_REQUIRED;
    return number_of((int)device->index, "unknown_error", 0) ? UNKNOWN : SUCCESS;
}

#define ENTER(device) \
    do { \
        Return failed = enter(device, __func__); \
        if (failed) \
            return failed; \
    } while (0)
#define READ(name, type, key, otherwise) \
    Return name(Device device, type *value) { \
        ENTER(device); \
        *value = (type)number_of((int)device->index, key, otherwise); \
        return SUCCESS; \
    }

Return nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    for (unsigned int i = 0; i < MAX_GPUS; i++)
        gpus[i].index = i;
    hang(-1, "nvmlInitWithFlags");
    return number_of(-1, "driver_down", 0) ? DRIVER_NOT_LOADED : SUCCESS;
}

Return nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(Return result) { return result == UNKNOWN ? "Unknown Error" : "an error of the fake"; }

Return nvmlSystemGetDriverVersion(char *version, unsigned int size) {
    snprintf(version, size, "580.00.fake");
    return SUCCESS;
}

Return nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = (unsigned int)number_of(-1, "count", 8) - (number_of(-1, "left_out", MAX_GPUS) < MAX_GPUS);
    return SUCCESS;
}

Return nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device *device) {
    if (index >= number_of(-1, "count", 8) || index >= MAX_GPUS)
        return INVALID_ARGUMENT;
    index += index >= number_of(-1, "left_out", MAX_GPUS);
    *device = &gpus[index];
    ENTER(*device);
    return SUCCESS;
}

Return nvmlDeviceGetIndex(Device device, unsigned int *index) {
    ENTER(device);
    *index = device->index;
    return SUCCESS;
}

Return nvmlDeviceGetName(Device device, char *name, unsigned int size) {
    ENTER(device);
    snprintf(name, size, "Fake H100");
    return SUCCESS;
}

Return nvmlDeviceGetUUID(Device device, char *uuid, unsigned int size) {
    ENTER(device);
    snprintf(uuid, size, "GPU-%08x-0000-0000-0000-000000000000", 0xfa4e0000u + device->index);
    return SUCCESS;
}

READ(nvmlDeviceGetPowerUsage, unsigned int, "power_mw", 450000)
READ(nvmlDeviceGetCurrentClocksEventReasons, u64, "reasons", 0)
READ(nvmlDeviceGetPcieReplayCounter, unsigned int, "pcie_replays", 0)
READ(nvmlDeviceGetCurrPcieLinkWidth, unsigned int, "pcie_width", 16)
READ(nvmlDeviceGetMaxPcieLinkWidth, unsigned int, "pcie_width_max", 16)
READ(nvmlDeviceGetCurrPcieLinkGeneration, unsigned int, "pcie_gen", 5)
READ(nvmlDeviceGetMaxPcieLinkGeneration, unsigned int, "pcie_gen_max", 5)
READ(nvmlDeviceGetSupportedEventTypes, u64, "event_types", XID_EVENTS)

Return nvmlDeviceGetTemperature(Device device, int sensor, unsigned int *value) {
    (void)sensor;
    ENTER(device);
    *value = (unsigned int)number_of((int)device->index, "temperature", 55);
    return SUCCESS;
}

Return nvmlDeviceGetClockInfo(Device device, int kind, unsigned int *value) {
    ENTER(device);
    *value = (unsigned int)number_of((int)device->index, kind == 2 ? "memory_clock" : "sm_clock", 1980);
    return SUCCESS;
}

Return nvmlDeviceGetTotalEccErrors(Device device, int kind, int since, u64 *value) {
    static const char *const keys[2][2] = {{"corrected", "corrected_ever"}, {"uncorrected", "uncorrected_ever"}};
    ENTER(device);
    *value = number_of((int)device->index, keys[kind & 1][since & 1], 0);
    return SUCCESS;
}

Return nvmlDeviceGetRemappedRows(Device device, unsigned int *corrected, unsigned int *uncorrected,
                                 unsigned int *pending, unsigned int *failed) {
    ENTER(device);
    int gpu = (int)device->index;
    *corrected = (unsigned int)number_of(gpu, "rows_correctable", 0);
    *uncorrected = (unsigned int)number_of(gpu, "rows_uncorrectable", 0);
    *pending = (unsigned int)number_of(gpu, "remap_pending", 0);
    *failed = (unsigned int)number_of(gpu, "remap_failed", 0);
    return SUCCESS;
}

Return nvmlDeviceGetNvLinkState(Device device, unsigned int link, int *active) {
    ENTER(device);
    if (link >= LINKS)
        return INVALID_ARGUMENT;
    *active = link < number_of((int)device->index, "links_up", LINKS);
    return SUCCESS;
}

Return nvmlDeviceGetUtilizationRates(Device device, Utilization *value) {
    ENTER(device);
    value->gpu = (unsigned int)number_of((int)device->index, "utilization", 97);
    value->memory = 60;
    return SUCCESS;
}

Return nvmlDeviceGetMemoryInfo(Device device, Memory *value) {
    ENTER(device);
    value->total = 80ULL << 30;
    value->used = number_of((int)device->index, "memory_used", 40ULL << 30);
    value->free = value->total - value->used;
    return SUCCESS;
}

Return nvmlDeviceGetFieldValues(Device device, int count, Field *fields) {
    ENTER(device);
    for (int i = 0; i < count; i++) {
        const char *key = fields[i].field == RECOVERY_ACTION ? "recovery"
                          : fields[i].field == LINK_CRC_FLIT ? "link_errors"
                                                             : NULL;
        int known = key || fields[i].field == LINK_CRC_DATA || fields[i].field == LINK_REPLAY ||
                    fields[i].field == LINK_RECOVERY;
        fields[i].type = UNSIGNED_LONG_LONG;
        fields[i].value = key ? number_of((int)device->index, key, 0) : 0;
        fields[i].result = known ? SUCCESS : NOT_SUPPORTED;
    }
    return SUCCESS;
}

Return nvmlEventSetCreate(EventSet *set) {
    char path[PATH_MAX];
    find(".events", path);
    *set = calloc(1, sizeof **set);
    FILE *file = fopen(path, "r");
    if (file) {
        fseek(file, 0, SEEK_END);
        (*set)->offset = ftell(file);
        fclose(file);
    }
    return SUCCESS;
}

Return nvmlEventSetFree(EventSet set) {
    free(set);
    return SUCCESS;
}

Return nvmlDeviceRegisterEvents(Device device, u64 types, EventSet set) {
    ENTER(device);
    set->watched[device->index] = (types & XID_EVENTS) != 0;
    return SUCCESS;
}

static int next_event(EventSet set, const char *path, Event *event) {
    char line[64];
    unsigned int gpu;
    u64 xid;
    int found = 0;
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    fseek(file, set->offset, SEEK_SET);
    while (!found && fgets(line, sizeof line, file) && strchr(line, '\n')) {
        set->offset = ftell(file);
        if (sscanf(line, "%u %llu", &gpu, &xid) == 2 && gpu < MAX_GPUS && set->watched[gpu]) {
            *event = (Event){&gpus[gpu], XID_EVENTS, xid, 0xFFFFFFFF, 0xFFFFFFFF};
            found = 1;
        }
    }
    fclose(file);
    return found;
}

/* As the real one does, it returns at once and each time anew while a watched GPU is lost. */
Return nvmlEventSetWait_v2(EventSet set, Event *event, unsigned int wait_ms) {
    char path[PATH_MAX];
    find(".events", path);
    for (long waited_us = 0;; waited_us += POLL_US) {
        hang(-1, "nvmlEventSetWait_v2");
        if (next_event(set, path, event))
            return SUCCESS;
        for (int i = 0; i < MAX_GPUS; i++)
            if (set->watched[i] && number_of(i, "lost", 0))
                return GPU_IS_LOST;
        if (waited_us >= (long)wait_ms * 1000)
            return TIMEOUT;
        usleep(POLL_US);
    }
}
