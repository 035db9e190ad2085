//! Threads for copies, which let guests go first.

use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};
use tokio_util::task::AbortOnDropHandle;

use super::ImageError;

/// Each of these threads weighs a thirtieth of one of a guest's (`sched_prio_to_weight`: 36 and 1024). What guests leave is
/// theirs anyway; where that is nothing, copies still come to their end, and guests to chunks that are on their way.
const NICE: i32 = 15;

/// Receiving takes little.
const WORKERS: usize = 1;

/// Threads that verify and write, at most one for each processor: more would weigh more and do no more. One more is for who
/// waits for the disk.
const MOST_WRITERS: usize = 4;

/// Runs `work` on these threads; it ends when who waits for it does.
pub(super) async fn run<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, ImageError> {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    let task = match RUNTIME.get_or_init(runtime) {
        Some(runtime) => runtime.spawn(work),
        // Copies are worth more than their manners.
        None => tokio::spawn(work),
    };
    AbortOnDropHandle::new(task).await.map_err(|_| ImageError::Aborted)
}

fn runtime() -> Option<Runtime> {
    let be_nice = || {
        // Nothing refuses a thread that wants less.
        let _ = rustix::process::setpriority_process(None, NICE);
    };
    let writers = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_WRITERS);
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(WORKERS).max_blocking_threads(writers + 1).thread_name("copy").enable_all();
    let runtime = builder.on_thread_start(be_nice).build();
    runtime.inspect_err(|e| tracing::warn!("copies have no threads of their own: {e}")).ok()
}
