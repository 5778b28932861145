// The names of collectives, and what one rank says that it calls, in words.
#pragma once

#include <string>

#include "shm/reduce.h"
#include "shm/segment.h"

namespace pypar::shm {

enum Kind : int32_t {
  kAllReduce,
  kReduce,
  kBroadcast,
  kAllGather,
  kReduceScatter,
  kAllToAll,
  kGather,
  kScatter,
  kBarrier,
  kNumKinds
};
constexpr const char* kKindNames[kNumKinds] = {"all_reduce", "reduce",         "broadcast",
                                               "all_gather", "reduce_scatter", "all_to_all",
                                               "gather",     "scatter",        "barrier"};
constexpr const char* kTypeNames[kNumShmTypes] = {
    "float32", "bfloat16", "float16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool", "bytes"};
constexpr const char* kOpNames[kNumShmOps] = {"SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"};

inline std::string describe(const Description& d) {
  std::string text = d.kind >= 0 && d.kind < kNumKinds ? kKindNames[d.kind] : "an unknown collective";
  text += "(" + std::to_string(d.bytes) + " bytes";
  if (d.dtype >= 0 && d.dtype < kShmBytes) text += std::string(", ") + kTypeNames[d.dtype];
  const bool reduces = d.kind == kAllReduce || d.kind == kReduce || d.kind == kReduceScatter;
  if (reduces && d.op >= 0 && d.op < kNumShmOps) text += std::string(", ") + kOpNames[d.op];
  if (d.root >= 0) text += ", root " + std::to_string(d.root);
  return text + ")";
}

}  // namespace pypar::shm
