// The reference backend: pread and pwrite on a few threads. Works wherever files do.
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "check.h"
#include "file_ops.h"
#include "io_queue.h"

namespace offload {

namespace {

constexpr std::chrono::milliseconds kBusyPause{1};

class PlainFileOps final : public FileOps {
 public:
  int64_t read(int fd, uint64_t offset, char* address, uint64_t nbytes) override {
    const ssize_t moved = pread(fd, address, nbytes, static_cast<off_t>(offset));
    return moved < 0 ? -errno : moved;
  }

  int64_t write(int fd, uint64_t offset, const char* address, uint64_t nbytes) override {
    const ssize_t moved = pwrite(fd, address, nbytes, static_cast<off_t>(offset));
    return moved < 0 ? -errno : moved;
  }
};

class ThreadQueue final : public IoQueue {
 public:
  ThreadQueue(size_t block_nbytes, FileOps& files, const char* name)
      : IoQueue(block_nbytes), files_(files), name_(name) {}
  ~ThreadQueue() override { close(); }

  const char* backend_name() const override { return name_; }

  // An errno when the system refuses a thread; the ones started so far end with the object.
  int start(unsigned num_threads) {
    try {
      for (unsigned i = 0; i < num_threads; ++i) {
        threads_.push_back(start_thread("offload-io", [this] { run(); }));
      }
    } catch (const std::system_error& refused) {
      return refused.code().value();
    }
    return 0;
  }

 private:
  void wake_backend() override { work_.notify_one(); }

  void join_backend() override {
    work_.notify_all();
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }

  void run() {
    Block block;
    while (next_block(&block)) {
      move(&block);
    }
  }

  // False when the queue is closing and nothing is left to start.
  bool next_block(Block* block) {
    std::unique_lock<std::mutex> lock(mutex_);
    work_.wait(lock, [this] { return has_unstarted() || closing_; });
    const bool taken = take_block(block);
    if (has_unstarted()) {
      work_.notify_one();  // one wakes the next, so a small transfer wakes only one thread
    }
    return taken;
  }

  void move(Block* block) {
    seal_block(*block);
    for (;;) {
      const int64_t result =
          block->op == kOpRead
              ? files_.read(block->fd, block->offset, block->address, block->nbytes)
              : files_.write(block->fd, block->offset, block->address, block->nbytes);
      const Next next = finish_block(block, result);
      if (next == Next::kDone) {
        return;
      }
      if (next == Next::kIssueAgainLater) {
        std::this_thread::sleep_for(kBusyPause);
      }
    }
  }

  FileOps& files_;
  const char* const name_;
  std::condition_variable work_;
  std::vector<std::thread> threads_;
};

}  // namespace

FileOps& plain_file_ops() {
  static PlainFileOps& ops = *new PlainFileOps;  // never destroyed: threads may outlive main()
  return ops;
}

std::unique_ptr<IoQueue> create_thread_queue(unsigned num_threads, size_t block_nbytes,
                                             FileOps& files, const char* name, int* error) {
  auto queue = std::make_unique<ThreadQueue>(block_nbytes, files, name);
  *error = queue->start(num_threads);
  if (*error != 0) {
    return nullptr;
  }
  return queue;
}

}  // namespace offload
