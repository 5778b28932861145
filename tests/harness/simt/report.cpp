#include "report.h"

#include <dlfcn.h>
#include <cstdio>
#include <cstring>
#include <map>
#include <tuple>

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));  // this module's first byte

namespace simt {

namespace {

struct Finding {
  std::string kind, text;
  const void *where, *other;
  uint64_t count = 1;
};

std::vector<Finding> findings;

std::string module_path() {
  Dl_info info;
  return dladdr(&__ehdr_start, &info) != 0 ? info.dli_fname : "";
}

bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

// The lines of an address, innermost first: pairs of a function and a place, one pair per inlined call.
std::vector<std::string> frames_of(const void* address) {
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -e '%s' -i -f -C -s 0x%llx 2>/dev/null",
                module_path().c_str(),
                static_cast<unsigned long long>(static_cast<const char*>(address) - &__ehdr_start));
  std::vector<std::string> lines;
  if (FILE* output = popen(command, "r")) {
    char line[4096];
    while (std::fgets(line, sizeof line, output) != nullptr) {
      lines.emplace_back(line);
      while (!lines.back().empty() && lines.back().back() == '\n') lines.back().pop_back();
    }
    pclose(output);
  }
  return lines;
}

std::string replaced(std::string text, const char* name, const std::string& value) {
  const size_t at = text.find(name);
  return at == std::string::npos ? text : text.replace(at, std::strlen(name), value);
}

std::string kernel_name() {
  const auto lines = frames_of(machine.call->kernel);
  return lines.empty() || lines[0] == "??" ? "a kernel" : lines[0];
}

}  // namespace

uint32_t pack_site(const void* site) {
  return site == nullptr ? 0 : static_cast<uint32_t>(static_cast<const char*>(site) - &__ehdr_start);
}

const void* unpack_site(uint32_t site) { return site == 0 ? nullptr : &__ehdr_start + site; }

std::string source_line(const void* site) {
  static std::map<const void*, std::string> known;
  const auto found = known.find(site);
  if (found != known.end()) return found->second;
  // The call itself is before its return address.
  const auto lines = frames_of(static_cast<const char*>(site) - 1);
  std::string text;
  for (size_t i = 1; i < lines.size(); i += 2) {
    std::string place = lines[i].substr(0, lines[i].find(" (discriminator"));
    // The wrappers of instructions say nothing of the kernel; what calls it is the machine.
    if (starts_with(place, "ptx.h:") || starts_with(place, "simt.h:") || starts_with(place, "tuple:") ||
        starts_with(place, "invoke.h:") || place[0] == '?') {
      continue;
    }
    text += (text.empty() ? "" : ", called at ") + place;
  }
  if (text.empty()) text = lines.size() > 1 ? lines[1] : "an unknown line";
  return known[site] = text;
}

bool same_source(const void* a, const void* b) { return a == b || source_line(a) == source_line(b); }

std::string block_name(const uint3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string thread_name(const Thread& t) { return "thread " + block_name(t.index); }

bool found_again(const char* kind, const void* where, const void* other) {
  for (auto& finding : findings) {
    if (finding.where == where && finding.other == other && finding.kind == kind) {
      ++finding.count;
      return true;
    }
  }
  return false;
}

void add_finding(const char* kind, const std::string& text, const void* where, const void* other) {
  if (found_again(kind, where, other)) return;
  const std::string device =
      machine.options.concurrent ? "device " + std::to_string(machine.device) + " " : "";
  findings.push_back({kind, device + "block " + block_name(machine.block->index) + " " + text, where, other});
  if (findings.size() >= machine.options.max_findings) stop_launch();
}

void stop_with(const char* kind, const std::string& text, const void* where, const void* other) {
  add_finding(kind, text, where, other);
  stop_launch();
}

void clear_findings() { findings.clear(); }
bool has_findings() { return !findings.empty(); }

std::string findings_text() {
  // Copies of one source line that the compiler made are one finding.
  std::vector<std::tuple<std::string, std::string, std::string, uint64_t>> merged;
  for (const auto& finding : findings) {
    const std::string lines = (finding.where == nullptr ? "" : source_line(finding.where)) + "|" +
                              (finding.other == nullptr ? "" : source_line(finding.other));
    std::string text = finding.text;
    if (finding.where != nullptr) text = replaced(text, "$1", source_line(finding.where));
    if (finding.other != nullptr) text = replaced(text, "$2", source_line(finding.other));
    bool known = false;
    for (auto& entry : merged) {
      if (std::get<0>(entry) == finding.kind && std::get<1>(entry) == lines) {
        std::get<3>(entry) += finding.count;
        known = true;
      }
    }
    if (!known) merged.emplace_back(finding.kind, lines, text, finding.count);
  }
  std::string all = "kernel " + kernel_name() + ": " + std::to_string(merged.size()) +
                    (merged.size() == 1 ? " fault" : " faults");
  if (merged.size() >= machine.options.max_findings) all += ", stopped there";
  for (const auto& [kind, lines, text, count] : merged) {
    all += "\n  " + kind + ": " + text;
    if (count > 1) all += " (" + std::to_string(count) + " times)";
  }
  return all;
}

}  // namespace simt
