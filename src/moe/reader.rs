//! Threads that read parts of experts into slots: positioned reads from a queue, in the order of need.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Where experts' bytes come from: a model file, or a test that injects faults.
pub trait Source: Send + Sync {
    /// Fills `buf` from `offset` of the `tensor`-th tensor; the error says which tensor and offset, and why.
    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) -> Result<(), String>;
}

impl Source for crate::gguf::Gguf {
    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        self.read_at(&self.tensors()[tensor], offset, buf).map_err(|e| e.to_string())
    }
}

/// A piece of work for the reading threads.
pub type Job = Box<dyn FnOnce() + Send>;

struct Queue {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    more: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, (VecDeque<Job>, bool)> {
        self.jobs.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The reading threads and their queue.
pub struct Reader {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Reader {
    /// Starts `lanes` threads.
    ///
    /// # Errors
    /// If the system refuses to start a thread.
    pub fn new(lanes: usize) -> std::io::Result<Self> {
        let queue = Arc::new(Queue { jobs: Mutex::new((VecDeque::new(), false)), more: Condvar::new() });
        let mut reader = Reader { queue, threads: Vec::new() };
        for i in 0..lanes.max(1) {
            let queue = reader.queue.clone();
            let thread = std::thread::Builder::new().name(format!("oncall-read-{i}"));
            reader.threads.push(thread.spawn(move || serve(&queue))?);
        }
        Ok(reader)
    }

    /// Queues jobs; they start in this order.
    pub fn submit(&self, jobs: impl IntoIterator<Item = Job>) {
        self.queue.lock().0.extend(jobs);
        self.queue.more.notify_all();
    }
}

impl Drop for Reader {
    /// Jobs that have begun are finished; those that haven't are dropped.
    fn drop(&mut self) {
        {
            let mut q = self.queue.lock();
            q.0.clear();
            q.1 = true;
        }
        self.queue.more.notify_all();
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}

fn serve(queue: &Queue) {
    loop {
        let job = {
            let mut q = queue.lock();
            loop {
                if q.1 {
                    return;
                }
                if let Some(job) = q.0.pop_front() {
                    break job;
                }
                q = queue.more.wait(q).unwrap_or_else(|e| e.into_inner());
            }
        };
        job();
    }
}
