// What the native tests share: a list of tests, files, page-aligned memory, and dice.
//
// CHECK (csrc/check.h) is the assertion. The programs are built plain and under sanitizers, so most
// tests ask for less than they cause: the sanitizers see the rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/check.h"
#include "../../csrc/io_queue.h"

namespace offload::tests {

struct Registration {
  Registration(const char* name, void (*run)());
};

#define TEST(name)                                            \
  static void name();                                         \
  static const Registration registration_##name(#name, name); \
  static void name()

// The backends to be had here: io_uring only where the kernel allows it.
std::vector<Backend> backends();
const char* name_of(Backend backend);

std::unique_ptr<IoQueue> make_queue(Backend backend, unsigned depth = 8,
                                    size_t block_nbytes = 4 * kPageNbytes,
                                    unsigned num_threads = 3);

using Dice = std::mt19937_64;

// A number below `limit`.
inline uint64_t roll(Dice& dice, uint64_t limit) { return dice() % limit; }

// Page-aligned bytes on the heap, of which not one more may be touched.
class Memory {
 public:
  explicit Memory(size_t nbytes, uint64_t seed = 0);  // random bytes
  char* data() { return bytes_.get(); }
  const char* data() const { return bytes_.get(); }
  size_t nbytes() const { return nbytes_; }
  bool operator==(const Memory& other) const;
  template <typename T>
  T* as(size_t index = 0) {
    return reinterpret_cast<T*>(bytes_.get()) + index;
  }

 private:
  struct Free {
    void operator()(char* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<char, Free> bytes_;
  size_t nbytes_;
};

// A file without a name, opened for direct I/O where the file system has it.
class File {
 public:
  explicit File(uint64_t nbytes);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }
  Memory read(uint64_t offset, uint64_t nbytes) const;
  void write(uint64_t offset, const Memory& content) const;

 private:
  int fd_;
};

}  // namespace offload::tests
