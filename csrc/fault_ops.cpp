#include "fault_ops.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "check.h"
#include "io_queue.h"

namespace offload {

namespace {

constexpr const char* kNames[kNumFaultKinds] = {"latency",    "reorder",  "short",  "eio",
                                                "enospc",     "eintr",    "eagain", "flip_read",
                                                "flip_write", "misplace", "drop"};
constexpr uint64_t kHeldBehindMax = 3;

// splitmix64: a good number for every seed, so that draws need no order.
uint64_t draw(uint64_t seed) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

double to_unit(uint64_t drawn) { return static_cast<double>(drawn >> 11) * 0x1p-53; }

bool can_befall(FaultKind kind, int op, uint64_t nbytes) {
  switch (kind) {
    case FaultKind::kShort:
      return nbytes > kPageNbytes;  // less than a page cannot be continued with direct I/O
    case FaultKind::kFlipRead:
      return op == kOpRead;
    case FaultKind::kEnospc:
    case FaultKind::kFlipWrite:
    case FaultKind::kMisplace:
    case FaultKind::kDrop:
      return op == kOpWrite;
    default:
      return true;
  }
}

// What becomes of one operation.
struct Fate {
  double late_s = 0;
  uint64_t held_until = 0;  // so many operations have ended; 0: not held
  double held_s = 0;        // at most
  bool is_struck = false;
  FaultKind kind = FaultKind::kEio;
  uint64_t dice = 0;
};

int refusal_of(FaultKind kind) {
  switch (kind) {
    case FaultKind::kEio:
      return EIO;
    case FaultKind::kEnospc:
      return ENOSPC;
    case FaultKind::kEintr:
      return EINTR;
    case FaultKind::kEagain:
      return EAGAIN;
    default:
      return 0;
  }
}

uint64_t shorter(uint64_t nbytes, uint64_t dice) {
  const uint64_t num_pages = (nbytes - 1) / kPageNbytes;  // at least one, and fewer than asked for
  return (1 + dice % num_pages) * kPageNbytes;
}

int64_t write_flipped(int fd, uint64_t offset, const char* address, uint64_t nbytes,
                      uint64_t dice) {
  void* memory = nullptr;
  CHECK(posix_memalign(&memory, kPageNbytes, nbytes) == 0);
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, std::free);
  char* copy = static_cast<char*>(memory);  // the caller's own bytes stay right
  std::memcpy(copy, address, nbytes);
  copy[dice % nbytes] ^= static_cast<char>(1 << (dice >> 32) % 8);
  return plain_file_ops().write(fd, offset, copy, nbytes);
}

// To another page of the file; dropped where the file has no other place of this size.
int64_t write_elsewhere(int fd, uint64_t offset, const char* address, uint64_t nbytes,
                        uint64_t dice) {
  struct stat status;
  if (fstat(fd, &status) != 0) {
    return -errno;
  }
  const auto file_nbytes = static_cast<uint64_t>(status.st_size);
  const uint64_t num_places = file_nbytes < nbytes ? 0 : (file_nbytes - nbytes) / kPageNbytes + 1;
  if (num_places < 2) {
    return static_cast<int64_t>(nbytes);
  }
  const uint64_t place = (offset / kPageNbytes + 1 + dice % (num_places - 1)) % num_places;
  return plain_file_ops().write(fd, place * kPageNbytes, address, nbytes);
}

class FaultFileOps final : public FileOps {
 public:
  int64_t read(int fd, uint64_t offset, char* address, uint64_t nbytes) override {
    const Fate fate = begin(kOpRead, nbytes);
    const int64_t result = faulty_read(fate, fd, offset, address, nbytes);
    end();
    return result;
  }

  int64_t write(int fd, uint64_t offset, const char* address, uint64_t nbytes) override {
    const Fate fate = begin(kOpWrite, nbytes);
    const int64_t result = faulty_write(fate, fd, offset, address, nbytes);
    end();
    return result;
  }

  void set(FaultPlan plan) {
    std::lock_guard<std::mutex> lock(mutex_);
    num_met_.assign(plan.rules.size(), 0);
    plan_ = std::move(plan);
    counts_ = {};
    is_set_ = true;
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    is_set_ = false;
  }

  FaultCounts counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    return counts_;
  }

 private:
  // Looks up what the plan has for the next operation, and lets it begin when it may.
  Fate begin(int op, uint64_t nbytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!is_set_) {
      return {};
    }
    ++(op == kOpRead ? counts_.num_reads : counts_.num_writes);
    const Fate fate = decide(op, nbytes);
    if (fate.held_until > 0) {
      ended_.wait_for(lock, std::chrono::duration<double>(fate.held_s),
                      [&] { return num_ended_ >= fate.held_until; });
    }
    lock.unlock();
    if (fate.late_s > 0) {
      std::this_thread::sleep_for(std::chrono::duration<double>(fate.late_s));
    }
    return fate;
  }

  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++num_ended_;
    }
    ended_.notify_all();
  }

  Fate decide(int op, uint64_t nbytes) {
    Fate fate;
    for (size_t i = 0; i < plan_.rules.size(); ++i) {
      const FaultRule& rule = plan_.rules[i];
      if (!can_befall(rule.kind, op, nbytes)) {
        continue;
      }
      const uint64_t number = ++num_met_[i];
      const uint64_t dice = draw(draw(plan_.seed + i) + number);
      if (rule.at != 0 ? rule.at == number : to_unit(dice) < rule.rate) {
        strike(rule.kind, draw(dice), &fate);
      }
    }
    return fate;
  }

  void strike(FaultKind kind, uint64_t dice, Fate* fate) {
    if (kind == FaultKind::kLatency) {
      fate->late_s = plan_.delay_s * to_unit(dice);
    } else if (kind == FaultKind::kReorder) {
      fate->held_until = num_ended_ + 1 + dice % kHeldBehindMax;
      fate->held_s = plan_.delay_s;
    } else if (!fate->is_struck) {
      fate->is_struck = true;
      fate->kind = kind;
      fate->dice = dice;
    } else {
      return;  // another rule was first
    }
    ++counts_.num_injected[static_cast<int>(kind)];
  }

  static int64_t faulty_read(const Fate& fate, int fd, uint64_t offset, char* address,
                             uint64_t nbytes) {
    FileOps& files = plain_file_ops();
    if (!fate.is_struck) {
      return files.read(fd, offset, address, nbytes);
    }
    if (const int error = refusal_of(fate.kind)) {
      return -error;
    }
    if (fate.kind == FaultKind::kShort) {
      return files.read(fd, offset, address, shorter(nbytes, fate.dice));
    }
    CHECK(fate.kind == FaultKind::kFlipRead);
    const int64_t result = files.read(fd, offset, address, nbytes);
    if (result > 0) {
      address[fate.dice % static_cast<uint64_t>(result)] ^=
          static_cast<char>(1 << (fate.dice >> 32) % 8);
    }
    return result;
  }

  static int64_t faulty_write(const Fate& fate, int fd, uint64_t offset, const char* address,
                              uint64_t nbytes) {
    FileOps& files = plain_file_ops();
    if (!fate.is_struck) {
      return files.write(fd, offset, address, nbytes);
    }
    if (const int error = refusal_of(fate.kind)) {
      return -error;
    }
    switch (fate.kind) {
      case FaultKind::kShort:
        return files.write(fd, offset, address, shorter(nbytes, fate.dice));
      case FaultKind::kFlipWrite:
        return write_flipped(fd, offset, address, nbytes, fate.dice);
      case FaultKind::kMisplace:
        return write_elsewhere(fd, offset, address, nbytes, fate.dice);
      default:
        CHECK(fate.kind == FaultKind::kDrop);
        return static_cast<int64_t>(nbytes);
    }
  }

  std::mutex mutex_;
  std::condition_variable ended_;
  // All below guarded by mutex_.
  bool is_set_ = false;
  FaultPlan plan_;
  std::vector<uint64_t> num_met_;  // by rule: operations that its kind can befall
  FaultCounts counts_;
  uint64_t num_ended_ = 0;
};

FaultFileOps& the_fault_ops() {
  static FaultFileOps& ops = *new FaultFileOps;  // never destroyed: threads may outlive main()
  return ops;
}

}  // namespace

const char* fault_name(FaultKind kind) { return kNames[static_cast<int>(kind)]; }

bool find_fault(const char* name, FaultKind* kind) {
  for (int i = 0; i < kNumFaultKinds; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *kind = static_cast<FaultKind>(i);
      return true;
    }
  }
  return false;
}

void set_fault_plan(FaultPlan plan) { the_fault_ops().set(std::move(plan)); }

void clear_fault_plan() { the_fault_ops().clear(); }

FaultCounts fault_counts() { return the_fault_ops().counts(); }

FileOps& fault_file_ops() { return the_fault_ops(); }

}  // namespace offload
