// Names of custom-call instances that all processes of a program agree on.
//
// XLA makes the instances of one module in an order that equal modules have in common. So an
// instance is named by its operation and attributes (the module's name is one of them) and, as a
// function that is jitted once and called three times gives three instances with the same ones, its
// ordinal among these in its module. The name is no attribute of the call itself: a number that
// differs from one start of the program to the next would keep JAX's persistent compilation cache
// from ever being hit.
#pragma once

#include <cstdint>
#include <vector>

#include "host/wire.h"

namespace freeio::host {

// The instances that are named from now on belong to another module.
void begin_module();

// `attributes`: the operation, then everything that tells its calls apart.
InstanceName name_instance(const std::vector<int64_t>& attributes);

}  // namespace freeio::host
