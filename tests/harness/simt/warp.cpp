// Operations of a warp: each is a meeting of the lanes that its mask names. The last to come does the work
// for all.
#include "machine.h"
#include "report.h"

namespace simt {

namespace {

constexpr const char* kDivergentOperation = "divergent warp operation";

// Instructions whose lanes must be at one place of the source. __syncwarp's may be at several.
bool same_meeting(const Wait& a, const Wait& b) {
  if (a.operation != b.operation || a.variant != b.variant || a.mask != b.mask) return false;
  return a.site == b.site || a.operation == Operation::kSyncWarp || same_source(a.site, b.site);
}

// Whether all of `lanes`, which wait and which `t` names, are in t's operation. One that is in another
// operation which names t is a fault: neither can go on. One that waits for others first may still come.
bool all_meet(const Warp& warp, const Thread& t, uint32_t lanes) {
  bool all = true;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const Thread& other = lane_of(warp, static_cast<unsigned>(__builtin_ctz(rest)));
    if (same_meeting(t.wait, other.wait)) continue;
    all = false;
    if ((other.wait.mask >> t.lane & 1) == 0) continue;
    char masks[64] = "";
    if (t.wait.mask != other.wait.mask) {
      std::snprintf(masks, sizeof masks, ", with masks %08x and %08x", t.wait.mask, other.wait.mask);
    }
    stop_with(kDivergentOperation,
              thread_name(t) + " is in " + operation_name(t.wait.operation) + " at $1, " +
                  thread_name(other) + ", which it names, in " + operation_name(other.wait.operation) +
                  " at $2" + masks,
              t.wait.site, other.wait.site);
  }
  return all;
}

void finish_sync(Warp& warp, uint32_t lanes) {
  uint32_t seen[kWarpSize] = {};
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const auto lane = static_cast<unsigned>(__builtin_ctz(rest));
    const Thread& t = lane_of(warp, lane);
    for (unsigned i = 0; i < kWarpSize; ++i) seen[i] = seen[i] < t.seen[i] ? t.seen[i] : seen[i];
    if (seen[lane] < t.clock) seen[lane] = t.clock;
  }
  ++warp.stamp;
  ++machine.counters.warp_syncs;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    Thread& t = lane_of(warp, static_cast<unsigned>(__builtin_ctz(rest)));
    std::memcpy(t.seen, seen, sizeof seen);
    t.clock = warp.stamp;
  }
}

void finish_shuffle(Warp& warp, uint32_t lanes, Shuffle mode) {
  ++machine.counters.shuffles;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    Thread& t = lane_of(warp, static_cast<unsigned>(lane));
    const int operand = static_cast<int>(t.in[2]), width = static_cast<int>(t.in[3]);
    const int first = lane & ~(width - 1), end = first + width;
    int source = lane;
    switch (mode) {
      case Shuffle::kIndex:
        source = first | (operand & (width - 1));
        break;
      case Shuffle::kUp:
        source = lane - operand < first ? lane : lane - operand;
        break;
      case Shuffle::kDown:
        source = lane + operand >= end ? lane : lane + operand;
        break;
      case Shuffle::kXor:
        source = (lane ^ operand) >= end ? lane : lane ^ operand;
        break;
    }
    const bool present = source >= 0 && source < 32 && (lanes >> source & 1) != 0;
    const Thread* from = present ? &lane_of(warp, static_cast<unsigned>(source)) : nullptr;
    // The value of a lane that takes no part is undefined: not a number.
    t.out[0] = from != nullptr ? from->in[0] : ~0u;
    t.out[1] = from != nullptr ? from->in[1] : ~0u;
  }
}

void finish_vote(Warp& warp, uint32_t lanes, Vote kind) {
  uint32_t ballot = 0;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const auto lane = static_cast<unsigned>(__builtin_ctz(rest));
    if (lane_of(warp, lane).in[0] != 0) ballot |= 1u << lane;
  }
  if (kind == Vote::kAny) ballot = ballot != 0;
  if (kind == Vote::kAll) ballot = ballot == lanes;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    lane_of(warp, static_cast<unsigned>(__builtin_ctz(rest))).out[0] = ballot;
  }
}

uint32_t combine(Reduce kind, bool is_signed, uint32_t a, uint32_t b) {
  const bool less = is_signed ? static_cast<int32_t>(b) < static_cast<int32_t>(a) : b < a;
  switch (kind) {
    case Reduce::kAdd:
      return a + b;
    case Reduce::kMin:
      return less ? b : a;
    case Reduce::kMax:
      return less ? a : b;
    case Reduce::kAnd:
      return a & b;
    case Reduce::kOr:
      return a | b;
    case Reduce::kXor:
      return a ^ b;
  }
  return a;
}

void finish_reduce(Warp& warp, uint32_t lanes, uint8_t variant) {
  uint32_t result = lane_of(warp, static_cast<unsigned>(__builtin_ctz(lanes))).in[0];
  for (uint32_t rest = lanes & (lanes - 1); rest != 0; rest &= rest - 1) {
    result = combine(static_cast<Reduce>(variant >> 1), (variant & 1) != 0, result,
                     lane_of(warp, static_cast<unsigned>(__builtin_ctz(rest))).in[0]);
  }
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    lane_of(warp, static_cast<unsigned>(__builtin_ctz(rest))).out[0] = result;
  }
}

// Does the operation in which `t` waits if all lanes have come that it names and that have not returned.
bool finish(Warp& warp, const Thread& t) {
  const Wait wait = t.wait;
  const uint32_t lanes = wait.mask & warp.alive;
  if (!warp.uniform && !all_meet(warp, t, lanes & warp.waiting)) return false;
  if ((lanes & ~warp.waiting) != 0) return false;
  switch (wait.operation) {
    case Operation::kSyncWarp:
      finish_sync(warp, lanes);
      break;
    case Operation::kShuffle:
      finish_shuffle(warp, lanes, static_cast<Shuffle>(wait.variant));
      break;
    case Operation::kVote:
      finish_vote(warp, lanes, static_cast<Vote>(wait.variant));
      break;
    case Operation::kReduce:
      finish_reduce(warp, lanes, wait.variant);
      break;
    default:
      if (lanes != ~0u) {
        stop_with(kDivergentOperation,
                  thread_name(t) + " is in " + operation_name(wait.operation) +
                      " at $1, which takes 32 lanes, but some do not exist or have returned",
                  wait.site);
      }
      wait.operation == Operation::kMma ? finish_mma(warp) : finish_load_matrix(warp);
  }
  warp.waiting &= ~lanes;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    lane_of(warp, static_cast<unsigned>(__builtin_ctz(rest))).wait.operation = Operation::kNone;
  }
  warp.runnable |= lanes;
  return true;
}

}  // namespace

void arrive(Thread& t, Operation operation, uint8_t variant, uint32_t mask, const void* site) {
  Warp& warp = machine.warps[t.warp];
  t.wait = {operation, variant, mask, site};
  if ((mask >> t.lane & 1) == 0) {
    char text[32];
    std::snprintf(text, sizeof text, "%08x", mask);
    stop_with(kDivergentOperation,
              thread_name(t) + " calls " + operation_name(operation) + " at $1 with mask " + text +
                  ", which lacks its own lane " + std::to_string(t.lane),
              site);
  }
  if (warp.waiting == 0) {
    warp.first = t.wait;
    warp.uniform = true;
  } else if (warp.uniform) {
    const Wait& first = warp.first;
    warp.uniform =
        first.operation == operation && first.variant == variant && first.mask == mask && first.site == site;
  }
  warp.waiting |= 1u << t.lane;
  if (finish(warp, t) && machine.options.thread_order != Order::kRandom) {
    warp.runnable &= ~(1u << t.lane);  // it goes on at once
    return;
  }
  block_thread(t);
}

void lane_exited(Warp& warp) {
  for (uint32_t rest = warp.waiting; rest != 0; rest &= rest - 1) {
    const Thread& t = lane_of(warp, static_cast<unsigned>(__builtin_ctz(rest)));
    if (t.wait.operation != Operation::kNone) finish(warp, t);
  }
}

void answer_active_mask(Warp& warp) {
  const uint32_t asking = warp.asking;
  const void* site = lane_of(warp, static_cast<unsigned>(__builtin_ctz(asking))).wait.site;
  uint32_t together = 0;
  for (uint32_t rest = asking; rest != 0; rest &= rest - 1) {
    const auto lane = static_cast<unsigned>(__builtin_ctz(rest));
    if (lane_of(warp, lane).wait.site == site) together |= 1u << lane;
  }
  for (uint32_t rest = together; rest != 0; rest &= rest - 1) {
    Thread& t = lane_of(warp, static_cast<unsigned>(__builtin_ctz(rest)));
    t.out[0] = together;
    release(t);
  }
  warp.asking &= ~together;
}

uint64_t shuffle(unsigned mask, Shuffle mode, uint64_t value, int operand, int width) {
  Thread& t = *current;
  const void* site = __builtin_return_address(0);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    stop_with(kDivergentOperation,
              thread_name(t) + " shuffles at $1 with width " + std::to_string(width) +
                  ", which is no power of two up to 32",
              site);
  }
  t.in[0] = static_cast<uint32_t>(value);
  t.in[1] = static_cast<uint32_t>(value >> 32);
  t.in[2] = static_cast<uint32_t>(operand);
  t.in[3] = static_cast<uint32_t>(width);
  arrive(t, Operation::kShuffle, static_cast<uint8_t>(mode), mask, site);
  return t.out[0] | uint64_t{t.out[1]} << 32;
}

unsigned vote(unsigned mask, Vote kind, bool predicate) {
  Thread& t = *current;
  t.in[0] = predicate;
  arrive(t, Operation::kVote, static_cast<uint8_t>(kind), mask, __builtin_return_address(0));
  return t.out[0];
}

unsigned reduce(unsigned mask, Reduce kind, unsigned value, bool is_signed) {
  Thread& t = *current;
  t.in[0] = value;
  const auto variant =
      static_cast<uint8_t>(static_cast<unsigned>(kind) << 1 | static_cast<unsigned>(is_signed));
  arrive(t, Operation::kReduce, variant, mask, __builtin_return_address(0));
  return t.out[0];
}

void sync_warp(unsigned mask) {
  arrive(*current, Operation::kSyncWarp, 0, mask, __builtin_return_address(0));
}

unsigned active_mask() {
  Thread& t = *current;
  t.wait = {Operation::kActiveMask, 0, ~0u, __builtin_return_address(0)};
  machine.warps[t.warp].asking |= 1u << t.lane;
  block_thread(t);
  return t.out[0];
}

}  // namespace simt
