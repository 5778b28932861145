// Faults that tests plant into kernels, to see that they are found. With PYPAR_PLANT_FAULTS a kernel asks for
// the one that the environment names (PYPAR_FAULT); what is shipped has none.
#pragma once

#ifdef PYPAR_PLANT_FAULTS
#  include <cstdlib>
#  include <cstring>
#endif

namespace pypar::cuda {

#ifdef PYPAR_PLANT_FAULTS
inline bool planted(const char* fault) {
  const char* const name = std::getenv("PYPAR_FAULT");
  return name != nullptr && std::strcmp(name, fault) == 0;
}
#else
__host__ __device__ constexpr bool planted(const char*) { return false; }
#endif

}  // namespace pypar::cuda
