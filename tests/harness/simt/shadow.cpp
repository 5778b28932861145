#include "shadow.h"

#include "report.h"

namespace simt {

namespace {

constexpr const char* kRace = "race";
constexpr const char* kNeverWritten = "read of shared memory never written";
constexpr const char* kMissingWait = "missing wait";

constexpr uint16_t kNobody = 0xffff;  // wrote what was read before any write

}  // namespace

bool ordered(const Thread& t, uint32_t epoch, unsigned number, uint32_t stamp) {
  const Block& block = *machine.block;
  if (epoch < machine.launch_epoch) return true;
  if (epoch == block.epoch) {
    return number == t.number || (number / kWarpSize == t.warp && t.seen[number % kWarpSize] >= stamp);
  }
  const uint32_t owner = owner_of(epoch);
  return owner == block.id || block.known.covers(owner, epoch, number, stamp) ||
         (t.acquired != nullptr && t.acquired->covers(owner, epoch, number, stamp));
}

namespace {

bool reads_ordered(const Thread& t, const Cell& cell) {
  if (cell.read_epoch != machine.block->epoch)
    return ordered(t, cell.read_epoch, cell.reader, cell.read_stamp);
  if (cell.reader / kWarpSize != t.warp) return false;
  for (uint32_t rest = cell.read_lanes & ~(1u << t.lane); rest != 0; rest &= rest - 1) {
    if (t.seen[__builtin_ctz(rest)] < cell.read_stamp) return false;
  }
  return true;
}

std::string place_text(const Place& place, size_t cell) {
  return "byte " + std::to_string(place.offset + (cell << place.shift)) + " of " + place.name;
}

bool is_own(uint32_t epoch) { return owner_of(epoch) == machine.block->id; }

// The name of a thread, and of its block and device if they are others.
std::string actor(uint32_t epoch, unsigned number) {
  if (is_own(epoch)) return thread_name(machine.threads[number]);
  const BlockRecord& block = machine.blocks[owner_of(epoch)];
  const dim3 size = block.size;
  const uint3 index = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
  const std::string device = machine.options.concurrent ? "device " + std::to_string(block.device) + " " : "";
  return device + "block " + block_name(block.index) + " thread " + block_name(index);
}

const char* why_race(uint32_t epoch) {
  if (is_own(epoch)) return "no barrier is between";
  const bool same = machine.blocks[owner_of(epoch)].device == machine.device;
  return same ? "blocks run in any order" : "no release and acquire is between";
}

void report_race(const Thread& t, const char* does, const std::string& place, const void* site,
                 const char* did, uint32_t epoch, unsigned number, uint32_t other_site) {
  add_finding(kRace,
              thread_name(t) + " " + does + " " + place + " at $1, which " + actor(epoch, number) + " " +
                  did + " at $2, and " + why_race(epoch),
              site, unpack_site(other_site));
}

// The reports of one access; `cell` is the first that is concerned.
struct Checker {
  Thread& t;
  Access access;
  const void* site;
  const Place& place;
  bool shared;

  const char* does() const {
    return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "updates";
  }

  void against_write(const Cell& cell, size_t i) const {
    if (found_again(kRace, site, unpack_site(cell.write_site))) return;
    report_race(t, does(), place_text(place, i), site, cell.atomic ? "updated" : "wrote", cell.write_epoch,
                cell.writer, cell.write_site);
  }

  void against_reads(const Cell& cell, size_t i) const {
    if (found_again(kRace, site, unpack_site(cell.read_site))) return;
    unsigned reader = cell.reader;
    if (reader == t.number) {  // another lane of the same read
      const uint32_t others = cell.read_lanes & ~(1u << t.lane);
      if (others != 0) reader = t.warp * kWarpSize + static_cast<unsigned>(__builtin_ctz(others));
    }
    report_race(t, does(), place_text(place, i), site, "read", cell.read_epoch, reader, cell.read_site);
  }

  void against_other(const Cell& cell, size_t i) const {
    if (found_again(kRace, site, unpack_site(cell.other_site))) return;
    report_race(t, does(), place_text(place, i), site, "read", cell.other_epoch, cell.other, cell.other_site);
  }

  void pending(const Cell& cell, size_t i) const {
    if (found_again(kMissingWait, site, unpack_site(cell.write_site))) return;
    add_finding(kMissingWait,
                thread_name(t) + " " + does() + " " + place_text(place, i) +
                    " at $1, for which the cp.async of " + thread_name(machine.threads[cell.writer]) +
                    " at $2 has not been waited",
                site, unpack_site(cell.write_site));
  }

  void never_written(size_t i) const {
    if (found_again(kNeverWritten, site, nullptr)) return;
    add_finding(kNeverWritten, thread_name(t) + " reads " + place_text(place, i) + " at $1", site);
  }
};

void add_read(const Thread& t, Cell& cell, uint32_t packed_site) {
  const uint32_t lane = 1u << t.lane;
  const uint32_t epoch = machine.block->epoch;
  if (cell.read_epoch == epoch && cell.reader / kWarpSize == t.warp && cell.read_stamp == t.clock) {
    cell.read_lanes |= lane;
    return;
  }
  // A read of another block is what any later write of this launch collides with: it stays.
  const auto elsewhere = [](uint32_t e) { return e >= machine.launch_epoch && !is_own(e); };
  const bool keep = elsewhere(cell.other_epoch) && !elsewhere(cell.read_epoch);
  if (cell.read_epoch != 0 && !keep && !reads_ordered(t, cell)) {
    cell.other_epoch = cell.read_epoch;
    cell.other_stamp = cell.read_stamp;
    cell.other_site = cell.read_site;
    cell.other = cell.reader;
    if (cell.read_lanes == lane) cell.other = static_cast<uint16_t>(t.number);
  }
  cell.read_epoch = epoch;
  cell.read_stamp = t.clock;
  cell.read_site = packed_site;
  cell.read_lanes = lane;
  cell.reader = static_cast<uint16_t>(t.number);
}

void set_write(const Thread& t, Cell& cell, uint32_t packed_site, bool atomic) {
  cell.write_epoch = machine.block->epoch;
  cell.write_stamp = t.clock;
  cell.write_site = packed_site;
  cell.writer = static_cast<uint16_t>(t.number);
  cell.atomic = atomic;
  cell.read_epoch = cell.other_epoch = 0;
}

}  // namespace

void check_cells(Thread& t, Cell* cells, size_t count, bool shared, Access access, const void* site,
                 const Place& place) {
  const uint32_t packed_site = pack_site(site);
  const uint32_t first_epoch = machine.block->first_epoch;
  const Checker checker{t, access, site, place, shared};
  for (size_t i = 0; i < count; ++i) {
    Cell& cell = cells[i];
    if (shared && cell.write_epoch < first_epoch) {  // an earlier block's memory is another one
      cell = Cell{};
      if (access != Access::kWrite) {
        checker.never_written(i);
        cell.write_epoch = first_epoch;  // one report is enough
        cell.writer = kNobody;
        continue;
      }
    }
    if (cell.pending && shared) {
      checker.pending(cell, i);
      if (access == Access::kRead) continue;
    } else if (cell.write_epoch != 0 && cell.writer != kNobody &&
               !(cell.atomic && access == Access::kAtomic) &&
               !ordered(t, cell.write_epoch, cell.writer, cell.write_stamp)) {
      checker.against_write(cell, i);
    }
    if (access == Access::kRead) {
      add_read(t, cell, packed_site);
      continue;
    }
    if (cell.read_epoch != 0 && !reads_ordered(t, cell)) checker.against_reads(cell, i);
    if (cell.other_epoch != 0 && !ordered(t, cell.other_epoch, cell.other, cell.other_stamp)) {
      checker.against_other(cell, i);
    }
    set_write(t, cell, packed_site, access == Access::kAtomic);
  }
}

void set_pending(Thread& t, Cell* cells, size_t count, const void* site) {
  for (size_t i = 0; i < count; ++i) {
    set_write(t, cells[i], pack_site(site), false);
    cells[i].pending = true;
  }
}

void set_arrived(Thread& t, Cell* cells, size_t count, const void* site) {
  for (size_t i = 0; i < count; ++i) {
    set_write(t, cells[i], pack_site(site), false);
    cells[i].pending = false;
  }
}

}  // namespace simt
