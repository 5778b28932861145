// Findings: what a kernel did wrong, once each, with the source lines.
#pragma once

#include <string>

#include "machine.h"

namespace simt {

// Adds a finding, unless this one at these places (return addresses in the kernel; null: none) is there
// already. `where` and `other` become source lines in the text: "$1" and "$2". A finding with stop ends the
// launch.
void add_finding(const char* kind, const std::string& text, const void* where, const void* other = nullptr);
[[noreturn]] void stop_with(const char* kind, const std::string& text, const void* where,
                            const void* other = nullptr);

// Whether this finding is there already; counts it.
bool found_again(const char* kind, const void* where, const void* other);

void clear_findings();
bool has_findings();
std::string findings_text();

std::string thread_name(const Thread& t);
std::string block_name(const uint3& index);
// "tile.cu:42, called at tile.cu:80" of a return address.
std::string source_line(const void* site);
bool same_source(const void* a, const void* b);

// Return addresses in 32 bits.
uint32_t pack_site(const void* site);
const void* unpack_site(uint32_t site);

}  // namespace simt
