// Stands in for GDRCopy's library, where symmetric memory is the CPU's (NVSHMEM_HEAP_KIND=SYSMEM).
//
// NVSHMEM's UCX transport maps GPU memory by it, for atomics and signals. Memory of the CPU needs
// no mapping: its address serves.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  unsigned long h;
} gdr_mh_t;

// As gdr_info_v2_t, up to what is set here.
typedef struct {
  uint64_t address;
  uint64_t mapped_size;
  uint32_t page_size;
  uint64_t tm_cycles;
  uint32_t cycles_per_ms;
  unsigned mapped : 1;
  unsigned wc_mapping : 1;
} gdr_info_t;

typedef struct {
  uint64_t address;
  uint64_t bytes;
} Pinned;

static int instance;

void* gdr_open(void) { return &instance; }
int gdr_close(void* gdr) { return 0; }

int gdr_pin_buffer_v2(void* gdr, unsigned long address, size_t bytes, uint32_t flags,
                      gdr_mh_t* handle) {
  Pinned* pinned = malloc(sizeof(*pinned));
  if (pinned == NULL) return 12;  // ENOMEM
  pinned->address = address;
  pinned->bytes = bytes;
  handle->h = (unsigned long)pinned;
  return 0;
}

int gdr_pin_buffer(void* gdr, unsigned long address, size_t bytes, uint64_t token, uint32_t space,
                   gdr_mh_t* handle) {
  return gdr_pin_buffer_v2(gdr, address, bytes, 0, handle);
}

int gdr_unpin_buffer(void* gdr, gdr_mh_t handle) {
  free((void*)handle.h);
  return 0;
}

int gdr_map(void* gdr, gdr_mh_t handle, void** mapped, size_t bytes) {
  *mapped = (void*)((Pinned*)handle.h)->address;
  return 0;
}

int gdr_map_v2(void* gdr, gdr_mh_t handle, void** mapped, size_t bytes, uint32_t flags) {
  return gdr_map(gdr, handle, mapped, bytes);
}

int gdr_unmap(void* gdr, gdr_mh_t handle, void* mapped, size_t bytes) { return 0; }

int gdr_get_info_v2(void* gdr, gdr_mh_t handle, gdr_info_t* info) {
  const Pinned* pinned = (const Pinned*)handle.h;
  memset(info, 0, sizeof(*info));
  info->address = pinned->address;
  info->mapped_size = pinned->bytes;
  info->page_size = 65536;
  info->mapped = 1;
  return 0;
}

int gdr_get_info(void* gdr, gdr_mh_t handle, gdr_info_t* info) {
  return gdr_get_info_v2(gdr, handle, info);
}

int gdr_get_attribute(void* gdr, int attribute, int* value) {
  *value = 0;
  return 0;
}

int gdr_copy_to_mapping(gdr_mh_t handle, void* to, const void* from, size_t bytes) {
  memcpy(to, from, bytes);
  return 0;
}

int gdr_copy_from_mapping(gdr_mh_t handle, void* to, const void* from, size_t bytes) {
  memcpy(to, from, bytes);
  return 0;
}

void gdr_runtime_get_version(int* major, int* minor) {
  *major = 2;
  *minor = 5;
}

int gdr_driver_get_version(void* gdr, int* major, int* minor) {
  gdr_runtime_get_version(major, minor);
  return 0;
}
