// Names of custom-call instances that all processes of a program agree on.
//
// An instance is named by its operation and attributes. Among these are the module's name and the
// call's number in its module, which tell most instances apart. The others come from one call: of a
// function that is jitted once and called three times, or of a loop that XLA unrolls. XLA makes
// them in an order that equal modules have in common, so they are counted. The count is no
// attribute: XLA alone knows it.
//
// XLA does not say which module an instance is of. It makes those of one module one after another,
// on one thread, while its compilation or loading goes on. So they are counted for each thread, and
// counted anew when the module is known to be complete: when its compilation has ended, when one of
// its instances runs, or when the thread goes on with Python code (which is seen on the main thread
// alone).
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace freeio::cpu {

// A custom-call instance as all processes of a program name it.
struct InstanceName {
  uint64_t module = 0;      // hash of the module's name
  uint64_t program = 0;     // hash of that and of the groups
  uint64_t attributes = 0;  // hash of the operation and all its attributes
  int64_t ordinal = 0;      // among the instances of one module that have these, as XLA makes them
};

// The instances of one module, as far as XLA has made them.
class InstanceBlock;

struct NamedInstance {
  InstanceName name;
  std::shared_ptr<InstanceBlock> block;
  bool is_first;  // of its block
};

// Called when XLA makes an instance. `module`: all that the instances of one module have in common,
// `program`: and those of its groups. `attributes`: all that tells its calls apart.
NamedInstance name_instance(const std::vector<int64_t>& module, const std::vector<int64_t>& program,
                            const std::vector<int64_t>& attributes);

// XLA makes no more instances of the block's module.
void module_is_complete(InstanceBlock& block);

// A compilation has ended that took `seconds`, on whatever thread.
void compilation_ended(double seconds);

// Whether this process has ever had an instance with these attributes.
bool has_instance(uint64_t attributes);

}  // namespace freeio::cpu
