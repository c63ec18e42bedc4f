// Preloaded into each process: its host's own name, and names of its own for shared memory.
//
// NVSHMEM maps the memory of processes to each other whose hosts have one name. So processes of one
// machine with different ones have only the network between them. JAX_PROCESS_ID and
// TESTS_RANKS_PER_HOST say which host a process is on.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

static int own_host(void) {
  const char* rank = getenv("JAX_PROCESS_ID");
  const char* per_host = getenv("TESTS_RANKS_PER_HOST");
  return rank && per_host ? atoi(rank) / atoi(per_host) : 0;
}

int gethostname(char* name, size_t bytes) {
  snprintf(name, bytes, "host%d", own_host());
  return 0;
}

static void own_name(const char* name, char* own, size_t bytes) {
  snprintf(own, bytes, "/host%d-%s", own_host(), *name == '/' ? name + 1 : name);
}

int shm_open(const char* name, int flags, mode_t mode) {
  int (*next)(const char*, int, mode_t) = dlsym(RTLD_NEXT, "shm_open");
  char own[256];
  own_name(name, own, sizeof(own));
  return next(own, flags, mode);
}

int shm_unlink(const char* name) {
  int (*next)(const char*) = dlsym(RTLD_NEXT, "shm_unlink");
  char own[256];
  own_name(name, own, sizeof(own));
  return next(own);
}
