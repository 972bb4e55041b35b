// Which copies of the vector kernels exist in this library and run on this processor.

#ifndef PISA_DISPATCH_H
#define PISA_DISPATCH_H

#include "pisa.h"

namespace pisa {

// The `index`-th supported table, best first, or null.
const Kernels* supported_kernels(int32_t index);

}  // namespace pisa

#endif  // PISA_DISPATCH_H
