/* A stand-in for the CUDA driver: what Triton's launcher calls, on a machine without a GPU.
 *
 * Modules are loaded and their kernels' resources read from the ELF file; launches are checked
 * against the chip and written down, and not run. What a real driver would refuse is refused with
 * an error, and the reason kept. Built against the cuda.h that Triton ships.
 */
#include "cuda.h"
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_REASONS 256
#define MAX_PARAMETERS 256
#define STATIC_LIMIT 49152 /* bytes of shared memory that need no permission */

typedef struct {
  char name[192];
  unsigned grid[3], threads, shared, cluster;
  int registers, spills, maps;
  char *text; /* all that the driver was given, if it is kept */
} Launch;

typedef struct {
  int magic, registers, local_bytes, max_threads, static_shared;
  int parameters, sizes[MAX_PARAMETERS]; /* of the parameters, in bytes */
} Module;

/* A tensor map holds what it was made of: the driver's own layout is not documented, but for a bit
 * of the second word, which is to be cleared where the tensor is small. */
typedef struct {
  uint64_t magic, bits, address, dim[5], strides[4];
  uint16_t box[5];
  uint8_t steps[5], type, rank, interleave, swizzle, promotion, fill;
} Encoded;

typedef struct {
  int magic, dynamic_limit;
  Module *module;
  char name[192];
} Function;

enum { MODULE = 0x4d4f4455, FUNCTION = 0x46554e43, MAP = 0x4d415053 };

static struct {
  int major, minor, sms, shared_optin, shared_sm;
} chip = {9, 0, 132, 232448, 233472};
static Launch *launches;
static int count, capacity, loads, maps, pause_us;
static pthread_mutex_t launching = PTHREAD_MUTEX_INITIALIZER;
static char reasons[MAX_REASONS][256];
static int reason_count;
/* Writes whose memory an address is, if it is any's: a launch's text has that and not the address.
 * Null: no texts. */
static bool (*where)(uint64_t address, char *text, size_t size);

static CUresult refuse(CUresult code, const char *format, ...) {
  if (reason_count < MAX_REASONS) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reasons[reason_count++], sizeof reasons[0], format, arguments);
    va_end(arguments);
  }
  return code;
}

/* For the tests. */

void stand_in_chip(int major, int minor, int sms, int shared_optin) {
  chip.major = major;
  chip.minor = minor;
  chip.sms = sms;
  chip.shared_optin = shared_optin;
  chip.shared_sm = shared_optin + 1024;
}
int stand_in_launches(void) { return count; }
int stand_in_loads(void) { return loads; }
int stand_in_maps(void) { return maps; }
const Launch *stand_in_launch(int i) { return &launches[i]; }
int stand_in_reasons(void) { return reason_count; }
const char *stand_in_reason(int i) { return reasons[i]; }
void stand_in_keep(bool (*given)(uint64_t, char *, size_t)) { where = given; }
void stand_in_sleep(int microseconds) { pause_us = microseconds; }
void stand_in_forget(void) {
  while (count)
    free(launches[--count].text);
  reason_count = maps = 0;
}

/* Errors, devices and contexts. */

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS                 ? "no error"
          : error == CUDA_ERROR_INVALID_HANDLE  ? "invalid resource handle"
          : error == CUDA_ERROR_INVALID_IMAGE   ? "device kernel image is invalid"
          : error == CUDA_ERROR_NOT_SUPPORTED   ? "operation not supported"
          : error == CUDA_ERROR_NO_BINARY_FOR_GPU ? "no kernel image is available for this device"
                                                : "invalid argument";
  return CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *n) {
  *n = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
static char the_context;
static __thread CUcontext current;
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&the_context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = chip.major;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = chip.minor;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = chip.shared_optin;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = chip.shared_sm;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = chip.sms;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    *value = 1980000;
    break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
    *value = 5120;
    break;
  default:
    return refuse(CUDA_ERROR_INVALID_VALUE, "device attribute %d is not known", attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return refuse(CUDA_ERROR_INVALID_VALUE, "pointer attribute %d is not known", attribute);
  *(CUdeviceptr *)data = pointer; /* the host's memory counts as the device's */
  return CUDA_SUCCESS;
}

/* Modules: a cubin is an ELF file whose .nv.info section says what its kernel takes. */

static unsigned half(const unsigned char *p) { return p[0] | p[1] << 8; }
static unsigned word(const unsigned char *p) { return half(p) | half(p + 2) << 16; }

static void read_info(const unsigned char *p, size_t size, Module *module) {
  const unsigned char *end = p + size;
  while (p + 4 <= end) {
    unsigned format = p[0], attribute = p[1], length = format == 4 ? half(p + 2) : 0;
    const unsigned char *value = p + 4;
    if (value + length > end)
      return;
    if (attribute == 0x2f && length >= 8) /* REGCOUNT: symbol, registers */
      module->registers = (int)word(value + 4);
    if (attribute == 0x11 && length >= 8) /* FRAME_SIZE: symbol, bytes of local memory */
      if ((int)word(value + 4) > module->local_bytes)
        module->local_bytes = (int)word(value + 4);
    if ((attribute == 0x05 || attribute == 0x10) && length >= 12) /* MAX_THREADS, REQNTID */
      module->max_threads = (int)(word(value) * word(value + 4) * word(value + 8));
    if (attribute == 0x17 && length >= 12) { /* KPARAM_INFO: index, ordinal, offset, size */
      int ordinal = (int)half(value + 4);
      if (ordinal < MAX_PARAMETERS)
        module->sizes[ordinal] = (int)(word(value + 8) >> 18);
      if (ordinal >= module->parameters)
        module->parameters = ordinal + 1;
    }
    p = value + length;
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const unsigned char *bytes = image;
  const Elf64_Ehdr *header = image;
  if (memcmp(bytes, ELFMAG, SELFMAG) || header->e_machine != 190 /* EM_CUDA */)
    return refuse(CUDA_ERROR_INVALID_IMAGE, "the image is no cubin");
  Module *made = calloc(1, sizeof *made);
  made->magic = MODULE;
  made->max_threads = 1024;
  const Elf64_Shdr *sections = (const void *)(bytes + header->e_shoff);
  const char *names = (const char *)bytes + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; ++i) {
    const char *name = names + sections[i].sh_name;
    if (!strncmp(name, ".nv.info", 8))
      read_info(bytes + sections[i].sh_offset, sections[i].sh_size, made);
    if (!strncmp(name, ".nv.shared.", 11) && strncmp(name + 11, "reserved", 8))
      made->static_shared += (int)sections[i].sh_size;
  }
  if (!made->registers) {
    free(made);
    return refuse(CUDA_ERROR_INVALID_IMAGE, "the cubin does not say how many registers it takes");
  }
  ++loads;
  *module = (CUmodule)made;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  ((Module *)module)->magic = 0; /* kept: a launch after it has to be seen */
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Module *of = (Module *)module;
  if (!of || of->magic != MODULE)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: its module is not loaded", name);
  Function *made = calloc(1, sizeof *made);
  made->magic = FUNCTION;
  made->module = of;
  made->dynamic_limit = STATIC_LIMIT;
  snprintf(made->name, sizeof made->name, "%s", name);
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

static Function *known(CUfunction handle) {
  Function *function = (Function *)handle;
  bool good = function && function->magic == FUNCTION && function->module->magic == MODULE;
  return good ? function : NULL;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
  Function *function = known(handle);
  if (!function)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "an attribute of a function that is not loaded");
  Module *module = function->module;
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? module->registers
           : attribute == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES      ? module->local_bytes
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? module->max_threads
           : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES     ? module->static_shared
                                                                  : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  Function *function = known(handle);
  if (!function)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "an attribute of a function that is not loaded");
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value + function->module->static_shared > chip.shared_optin)
      return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of shared memory, %d are there",
                    function->name, value, chip.shared_optin);
    function->dynamic_limit = value;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_VALUE; /* no oversized shared memory: Triton then asks as before */
}
CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache config) {
  return known(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction handle, const CUlaunchConfig *config) {
  *n = chip.sms;
  return known(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

/* Tensor maps, by the documentation of cuTensorMapEncodeTiled. */

static const int SIZES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *dim, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const CUresult bad = CUDA_ERROR_INVALID_VALUE;
  if (chip.major < 9)
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "tensor maps need compute capability 9.0");
  if (!map || (size_t)map % 64)
    return refuse(bad, "tensor map: not aligned to 64 bytes");
  if (rank < 1 || rank > 5 || type >= sizeof SIZES / sizeof *SIZES)
    return refuse(bad, "tensor map: rank %u of type %d", rank, type);
  if (!address || (size_t)address % 16)
    return refuse(bad, "tensor map: address %p is not aligned to 16 bytes", address);
  for (unsigned i = 0; i < rank; ++i) {
    if (!dim[i] || dim[i] > 1ull << 32)
      return refuse(bad, "tensor map: size %llu", (unsigned long long)dim[i]);
    if (!box[i] || box[i] > 256)
      return refuse(bad, "tensor map: a box of %u, 256 at most", box[i]);
    if (steps[i] < 1 || steps[i] > 8)
      return refuse(bad, "tensor map: element stride %u", steps[i]);
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
      return refuse(bad, "tensor map: stride of %llu bytes", (unsigned long long)strides[i]);
    if (i + 1 < rank && i && strides[i] < strides[i - 1])
      return refuse(bad, "tensor map: strides that fall");
  }
  unsigned inner = box[0] * SIZES[type];
  static const unsigned SPANS[] = {0, 32, 64, 128};
  if (inner % 16)
    return refuse(bad, "tensor map: inner box of %u bytes", inner);
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B || (swizzle && inner > SPANS[swizzle]))
    return refuse(bad, "tensor map: inner box of %u bytes in swizzle %d", inner, swizzle);
  Encoded made = {MAP, ~0ull, (uint64_t)address};
  made.type = type, made.rank = rank, made.interleave = interleave, made.swizzle = swizzle;
  made.promotion = promotion, made.fill = fill;
  for (unsigned i = 0; i < rank; ++i) {
    made.dim[i] = dim[i], made.box[i] = box[i], made.steps[i] = steps[i];
    if (i + 1 < rank)
      made.strides[i] = strides[i];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  ++maps;
  return CUDA_SUCCESS;
}

/* Launches. */

static void put_address(FILE *out, uint64_t address) {
  char text[96];
  if (where(address, text, sizeof text))
    fprintf(out, " %s", text);
  else
    fprintf(out, " %#llx", (unsigned long long)address);
}

static void put_map(FILE *out, const Encoded *map) {
  fprintf(out, " map");
  put_address(out, map->address);
  fprintf(out, " type %d interleave %d swizzle %d promotion %d fill %d", map->type,
          map->interleave, map->swizzle, map->promotion, map->fill);
  if (~map->bits)
    fprintf(out, " cleared %#llx", (unsigned long long)~map->bits);
  for (int i = 0; i < map->rank; ++i)
    fprintf(out, " [%llu by %llu, box %d, step %d]", (unsigned long long)map->dim[i],
            (unsigned long long)(i ? map->strides[i - 1] : 0), map->box[i], map->steps[i]);
}

/* Sizes of attributes' values: what lies behind them is not set. */
static int attribute_size(CUlaunchAttributeID id) {
  return id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION ? 12 : 4;
}

static void put_bytes(FILE *out, const unsigned char *bytes, int size) {
  for (int i = 0; i < size; ++i)
    fprintf(out, "%02x", bytes[i]);
}

static char *text_of(const CUlaunchConfig *config, const Function *function, void **arguments) {
  char *text;
  size_t size;
  FILE *out = open_memstream(&text, &size);
  fprintf(out, "%s grid %u %u %u block %u %u %u shared %u stream %p", function->name,
          config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
          config->blockDimY, config->blockDimZ, config->sharedMemBytes, (void *)config->hStream);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    fprintf(out, "\nattribute %d ", (int)config->attrs[i].id);
    put_bytes(out, (const void *)&config->attrs[i].value, attribute_size(config->attrs[i].id));
  }
  for (int i = 0; i < function->module->parameters; ++i) {
    int bytes = function->module->sizes[i];
    fprintf(out, "\nparameter %d of %d bytes:", i, bytes);
    uint64_t eight = 0;
    if (bytes >= 8)
      memcpy(&eight, arguments[i], sizeof eight);
    if (bytes == sizeof(CUtensorMap) && eight == MAP) {
      put_map(out, arguments[i]);
    } else if (bytes == 8) {
      put_address(out, eight);
    } else {
      fputc(' ', out);
      put_bytes(out, arguments[i], bytes);
    }
  }
  fclose(out);
  return text;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **arguments,
                          void **extra) {
  Function *function = known(handle);
  if (!function)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "a launch of a function that is not loaded");
  const char *name = function->name;
  const CUresult bad = CUDA_ERROR_INVALID_VALUE;
  Module *module = function->module;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      cluster = config->attrs[i].value.clusterDim.x;
  unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 2147483647u || grid[1] > 65535 ||
      grid[2] > 65535)
    return refuse(bad, "%s: a grid of %u x %u x %u", name, grid[0], grid[1], grid[2]);
  if (!threads || threads > 1024 || threads > (unsigned)module->max_threads)
    return refuse(bad, "%s: %u threads, %d at most", name, threads, module->max_threads);
  /* registers are given out to warps, eight a thread at a time */
  unsigned registers = (unsigned)((module->registers + 7) / 8 * 8) * threads;
  if (registers > 65536)
    return refuse(bad, "%s: %u registers, 65536 are there", name, registers);
  if (config->sharedMemBytes > (unsigned)function->dynamic_limit)
    return refuse(bad, "%s: %u bytes of shared memory, %d are allowed", name,
                  config->sharedMemBytes, function->dynamic_limit);
  if (cluster > 1 && (chip.major < 9 || cluster > 8 || grid[0] % cluster))
    return refuse(bad, "%s: a cluster of %u for a grid of %u", name, cluster, grid[0]);
  if (!arguments)
    return refuse(bad, "%s: no arguments", name);
  if (!current)
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "%s: this thread has no context", name);
  if (pause_us)
    usleep(pause_us);
  pthread_mutex_lock(&launching);
  if (count == capacity) {
    capacity = capacity ? 2 * capacity : 1024;
    launches = realloc(launches, capacity * sizeof *launches);
  }
  Launch *launch = &launches[count++];
  memset(launch, 0, sizeof *launch);
  snprintf(launch->name, sizeof launch->name, "%s", name);
  memcpy(launch->grid, grid, sizeof grid);
  launch->threads = threads;
  launch->shared = config->sharedMemBytes;
  launch->cluster = cluster;
  launch->registers = module->registers;
  launch->spills = module->local_bytes;
  if (where)
    launch->text = text_of(config, function, arguments);
  pthread_mutex_unlock(&launching);
  return CUDA_SUCCESS;
}
