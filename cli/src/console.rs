//! A guest's serial console on this terminal: raw bytes both ways, and a few keys of our own behind Ctrl-A.

use std::io::{self, Write};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::terminal::{self, RawMode};

const CTRL_A: u8 = 0x01;
/// Typed bytes that may wait for a guest that does not read them; beyond it, keys wait in the terminal.
const MAX_UNSENT: usize = 4096;

/// How a console session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The other side closed it.
    Closed,
    /// The person left.
    Left,
    /// This process was told to end, by this signal.
    Signal(i32),
}

/// What the person asks for with Ctrl-A and another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// X.
    Leave,
    /// P.
    PowerButton,
    /// ? or H.
    Help,
}

/// Finds our keys among those for the guest.
#[derive(Debug, Default)]
struct Escapes {
    /// Ctrl-A was typed and not what follows it.
    begun: bool,
}

impl Escapes {
    /// Appends what is for the guest to `guest` and returns what is for us.
    fn feed(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for &byte in typed {
            match (std::mem::take(&mut self.begun), byte) {
                (false, CTRL_A) => self.begun = true,
                (false, _) => guest.push(byte),
                (true, b'a' | b'A' | CTRL_A) => guest.push(CTRL_A),
                (true, b'x' | b'X') => commands.push(Command::Leave),
                (true, b'p' | b'P') => commands.push(Command::PowerButton),
                (true, b'?' | b'h' | b'H') => commands.push(Command::Help),
                // Neither ours nor meant for the guest: a slip of the finger.
                (true, _) => {}
            }
        }
        commands
    }
}

/// What this console's keys do.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    /// What leaving means: `stops the VM at once`.
    pub leave: &'static str,
    /// There is a power button to press.
    pub power_button: bool,
}

impl Keys {
    fn help(&self) -> String {
        let power = if self.power_button { "\r\n  Ctrl-A P  presses the VM's power button" } else { "" };
        format!("\r\n  Ctrl-A X  {}{power}\r\n  Ctrl-A A  sends Ctrl-A\r\n  Ctrl-A ?  shows this\r\n", self.leave)
    }
}

/// Connects the terminal with `stream` until one side ends it. `press` is called for the power button.
///
/// # Errors
/// The terminal cannot be used, or the stream broke.
pub async fn attach(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    keys: Keys,
    mut press: impl FnMut(),
) -> io::Result<End> {
    let mut signals = Signals::new()?;
    let raw = RawMode::enter()?;
    let mut typed = terminal::keys();
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let (mut escapes, mut unsent, mut typing) = (Escapes::default(), Vec::new(), true);
    let mut buffer = vec![0; 16 << 10];
    let end = loop {
        tokio::select! {
            read = from_guest.read(&mut buffer) => match read {
                Ok(0) => break End::Closed,
                Ok(n) => show(&buffer[..n])?,
                // A peer that was killed resets the connection; that is an end like another.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break End::Closed,
                Err(e) => return Err(e),
            },
            chunk = typed.recv(), if typing && unsent.len() < MAX_UNSENT => match chunk {
                None => typing = false,
                Some(bytes) => {
                    let commands = escapes.feed(&bytes, &mut unsent);
                    for command in &commands {
                        match command {
                            Command::PowerButton if keys.power_button => press(),
                            Command::Help | Command::PowerButton => eprint!("{}", keys.help()),
                            Command::Leave => {}
                        }
                    }
                    if commands.contains(&Command::Leave) {
                        break End::Left;
                    }
                }
            },
            written = to_guest.write(&unsent), if !unsent.is_empty() => match written {
                Ok(n) => drop(unsent.drain(..n)),
                // The guest's last words are still to be read.
                Err(_) => { unsent.clear(); typing = false; }
            },
            number = signals.next() => break End::Signal(number),
        }
    };
    drop(raw);
    Ok(end)
}

fn show(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// The signals that ask a process to end.
#[derive(Debug)]
pub struct Signals {
    received: mpsc::Receiver<i32>,
}

impl Signals {
    /// From here on they no longer end the process by themselves. Must be called inside a runtime.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let (sender, received) = mpsc::channel(4);
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()] {
            let (mut stream, sender) = (signal(kind)?, sender.clone());
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if sender.send(kind.as_raw_value()).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { received })
    }

    /// The next one.
    pub async fn next(&mut self) -> i32 {
        match self.received.recv().await {
            Some(number) => number,
            // The tasks above live as long as the runtime.
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Command>) {
        let (mut escapes, mut guest, mut commands) = (Escapes::default(), Vec::new(), Vec::new());
        for piece in pieces {
            commands.extend(escapes.feed(piece, &mut guest));
        }
        (guest, commands)
    }

    #[test]
    fn ordinary_keys_reach_the_guest_and_ours_do_not() {
        assert_eq!(feed(&[b"ls\r\x03\x04"]), (b"ls\r\x03\x04".to_vec(), vec![]));
        assert_eq!(feed(&[b"a\x01xb"]), (b"ab".to_vec(), vec![Command::Leave]));
        assert_eq!(feed(&[b"\x01P\x01?\x01h"]), (vec![], vec![Command::PowerButton, Command::Help, Command::Help]));
    }

    #[test]
    fn ctrl_a_itself_can_be_sent_and_a_cut_in_between_does_not_matter() {
        assert_eq!(feed(&[b"\x01a\x01\x01x"]), (b"\x01\x01x".to_vec(), vec![]));
        assert_eq!(feed(&[b"\x01", b"", b"X"]), (vec![], vec![Command::Leave]));
        assert_eq!(feed(&[b"\x01z!"]), (b"!".to_vec(), vec![]));
    }
}
