// Names of custom-call instances that all processes of a program agree on.
//
// The name of an instance is made of its operation and attributes. Among these are the module's
// name and the call's number in its module, which tell most instances apart. Instances with equal
// attributes come from one call: of a function that is jitted once and called three times, or of a
// loop that XLA unrolls. XLA makes them in an order that is the same for equal modules. So they are
// counted as XLA makes them.
//
// XLA does not say to which module an instance belongs. But it makes all instances of a module one
// after another, on one thread, while it compiles or loads the module. So they are counted for each
// thread. The count begins anew when the module is known to be complete: when its compilation has
// ended, when one of its instances runs, or when the main thread goes on with Python code.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace freeio::cpu {

// A custom-call instance as all processes of a program name it.
struct InstanceName {
  uint64_t module = 0;      // hash of the module's name
  uint64_t program = 0;     // hash of the module's name and of the groups
  uint64_t attributes = 0;  // hash of the operation and all its attributes
  int64_t ordinal =
      0;  // among the instances of the module with equal attributes, as XLA makes them
};

// The instances of one module, as far as XLA has made them.
class ModuleInstances;

struct NamedInstance {
  InstanceName name;
  std::shared_ptr<ModuleInstances> instances;
  bool is_first;  // of its module
};

// Called when XLA makes an instance. `module`: what all instances of one module have in common.
// `program`: what those of one module and its groups have in common. `attributes`: what tells the
// calls of a program apart.
NamedInstance name_instance(const std::vector<int64_t>& module, const std::vector<int64_t>& program,
                            const std::vector<int64_t>& attributes);

// XLA will make no more instances of this module.
void module_is_complete(ModuleInstances& module_instances);

// A compilation on some thread has ended. It took `seconds`.
void compilation_ended(double seconds);

// Whether this process has ever had an instance with these attributes.
bool has_instance(uint64_t attributes);

}  // namespace freeio::cpu
