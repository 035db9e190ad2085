//! This process's terminal: raw mode that always ends, and keys as they are typed.

use std::io::{self, IsTerminal, Read};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::mpsc;

/// Whether messages that only a person needs make sense: somebody types, and somebody reads what we say.
pub fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// While one of these lives, the terminal passes every key on at once and echoes nothing. Without a terminal it does
/// nothing. The old settings come back when it is dropped, which includes a panic; only SIGKILL can prevent that.
#[derive(Debug)]
pub struct RawMode {
    saved: Option<Termios>,
}

impl RawMode {
    /// Changes nothing now; brings the settings of this moment back later, whatever a child process does to them.
    pub fn none() -> Self {
        let stdin = io::stdin();
        Self { saved: stdin.is_terminal().then(|| tcgetattr(&stdin).ok()).flatten() }
    }

    /// Switches stdin's terminal to raw mode.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self { saved: None });
        }
        let saved = tcgetattr(&stdin)?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Self { saved: Some(saved) })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            // A terminal that has gone away needs no restoring.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, saved);
        }
    }
}

/// What is typed, in pieces; ends when stdin does. A thread reads it, since stdin can be anything, also a file that
/// cannot be polled; the thread ends with the process.
pub fn keys() -> mpsc::Receiver<Vec<u8>> {
    // Few and small: what a slow guest has not taken yet stays in the pipe it came from.
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => {
                    if sender.blocking_send(buffer[..n].to_vec()).is_err() {
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}
