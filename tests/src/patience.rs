//! Waiting for something that can only be asked about.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two questions: short beside everything that is waited for, long beside the cost of a question.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks until there is an answer, at most for `timeout`. `what` stands in the error. An error of `ask` ends the wait.
pub fn until<T>(what: &str, timeout: Duration, ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until_every(PAUSE, what, timeout, ask)
}

/// The same with another time between two questions, for who measures.
pub fn until_every<T>(
    pause: Duration,
    what: &str,
    timeout: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {timeout:?}");
        }
        std::thread::sleep(pause);
    }
}
