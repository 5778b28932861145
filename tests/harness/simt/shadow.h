// What is known of a byte of shared memory, or of an element of a buffer, and the races that follow from it.
#pragma once

#include "memory.h"

namespace simt {

// Epochs (Block::epoch) count barriers over all blocks and launches; 0 is never. Sites are return addresses,
// packed.
struct Cell {
  uint32_t write_epoch, write_stamp, write_site;
  // The latest reads: lanes of one warp with one stamp.
  uint32_t read_epoch, read_stamp, read_site, read_lanes;
  // One read more that the above does not cover: of another block, another warp, or another stamp.
  uint32_t other_epoch, other_stamp, other_site;
  uint16_t writer, reader, other;
  bool atomic;   // the write was one
  bool pending;  // an asynchronous copy has not been waited for
};

// Where the cells are, for the text.
struct Place {
  const char* name;
  size_t offset;
  unsigned shift;
};

// Whether an access by thread `number` in `epoch` with `stamp` comes before what `t` does now, whatever the
// timing.
bool ordered(const Thread& t, uint32_t epoch, unsigned number, uint32_t stamp);

void check_cells(Thread& t, Cell* cells, size_t count, bool shared, Access access, const void* site,
                 const Place& place);
void set_pending(Thread& t, Cell* cells, size_t count, const void* site);
void set_arrived(Thread& t, Cell* cells, size_t count, const void* site);

}  // namespace simt
