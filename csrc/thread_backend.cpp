// The reference backend: pread and pwrite on a few threads. Works wherever files do.
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "check.h"
#include "io_queue.h"

namespace offload {

namespace {

constexpr std::chrono::milliseconds kBusyPause{1};

int64_t move_once(int op, int fd, uint64_t offset, char* address, uint64_t nbytes) {
  const ssize_t moved = op == kOpRead ? pread(fd, address, nbytes, static_cast<off_t>(offset))
                                      : pwrite(fd, address, nbytes, static_cast<off_t>(offset));
  return moved < 0 ? -errno : moved;
}

class ThreadQueue final : public IoQueue {
 public:
  explicit ThreadQueue(size_t block_nbytes) : IoQueue(block_nbytes) {}
  ~ThreadQueue() override { close(); }

  const char* backend_name() const override { return "threads"; }

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
          move_once(block->op, block->fd, block->offset, block->address, block->nbytes);
      const Next next = finish_block(block, result);
      if (next == Next::kDone) {
        return;
      }
      if (next == Next::kIssueAgainLater) {
        std::this_thread::sleep_for(kBusyPause);
      }
    }
  }

  std::condition_variable work_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<IoQueue> create_thread_queue(unsigned num_threads, size_t block_nbytes,
                                             int* error) {
  auto queue = std::make_unique<ThreadQueue>(block_nbytes);
  *error = queue->start(num_threads);
  if (*error != 0) {
    return nullptr;
  }
  return queue;
}

}  // namespace offload
