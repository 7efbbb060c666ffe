#include "harness.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

namespace offload::tests {

namespace {

constexpr unsigned kSecondsMax = 300;  // of the whole program: a hang is a failure

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

int open_unnamed() {
  const char* folder = getenv("TMPDIR");
  std::string path = std::string(folder == nullptr ? "/tmp" : folder) + "/offload-test-XXXXXX";
  int fd = mkostemp(path.data(), O_CLOEXEC | O_DIRECT);
  if (fd < 0 && errno == EINVAL) {
    fd = mkostemp(path.data(), O_CLOEXEC);
  }
  CHECK(fd >= 0);
  CHECK(unlink(path.c_str()) == 0);
  return fd;
}

}  // namespace

Registration::Registration(const char* name, void (*run)()) { all_tests().push_back({name, run}); }

std::vector<Backend> backends() {
  std::vector<Backend> found = {Backend::kThreads, Backend::kFaults};
  if (uring_probe() == 0) {
    found.push_back(Backend::kUring);
  }
  return found;
}

const char* name_of(Backend backend) {
  return backend == Backend::kUring ? "uring" : backend == Backend::kThreads ? "threads" : "faults";
}

std::unique_ptr<IoQueue> make_queue(Backend backend, unsigned depth, size_t block_nbytes,
                                    unsigned num_threads) {
  int error = 0;
  std::unique_ptr<IoQueue> queue =
      IoQueue::create(backend, depth, block_nbytes, num_threads, &error, kPageNbytes);
  CHECK(queue != nullptr && error == 0);
  CHECK(std::strcmp(queue->backend_name(), name_of(backend)) == 0);
  return queue;
}

Memory::Memory(size_t nbytes, uint64_t seed) : nbytes_(nbytes) {
  void* bytes = nullptr;
  CHECK(posix_memalign(&bytes, kPageNbytes, nbytes) == 0);
  bytes_.reset(static_cast<char*>(bytes));
  Dice dice(seed);
  for (size_t i = 0; i < nbytes; i += sizeof(uint64_t)) {
    const uint64_t word = dice();
    std::memcpy(bytes_.get() + i, &word, std::min(sizeof word, nbytes - i));
  }
}

bool Memory::operator==(const Memory& other) const {
  return nbytes_ == other.nbytes_ && std::memcmp(data(), other.data(), nbytes_) == 0;
}

File::File(uint64_t nbytes) : fd_(open_unnamed()) {
  CHECK(posix_fallocate(fd_, 0, static_cast<off_t>(nbytes)) == 0);
}

File::~File() { CHECK(::close(fd_) == 0); }

Memory File::read(uint64_t offset, uint64_t nbytes) const {
  Memory content(nbytes);
  CHECK(pread(fd_, content.data(), nbytes, static_cast<off_t>(offset)) ==
        static_cast<ssize_t>(nbytes));
  return content;
}

void File::write(uint64_t offset, const Memory& content) const {
  CHECK(pwrite(fd_, content.data(), content.nbytes(), static_cast<off_t>(offset)) ==
        static_cast<ssize_t>(content.nbytes()));
}

int run_all(const char* only) {
  int num_run = 0;
  for (const Test& test : all_tests()) {
    if (only != nullptr && std::strstr(test.name, only) == nullptr) {
      continue;
    }
    const auto begin = std::chrono::steady_clock::now();
    std::printf("%-45s", test.name);
    std::fflush(stdout);
    test.run();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    std::printf(" %6.2f s\n", elapsed.count());
    ++num_run;
  }
  std::printf("%d passed\n", num_run);
  return num_run > 0 ? 0 : 1;
}

}  // namespace offload::tests

// Runs all tests, or those whose name contains the argument.
int main(int argc, char** argv) {
  alarm(offload::tests::kSecondsMax);
  return offload::tests::run_all(argc > 1 ? argv[1] : nullptr);
}
