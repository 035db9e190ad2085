//! What is printed: tables for people, JSON for programs, and how numbers are written.
//!
//! Results go to stdout and nothing else does; progress, notes and errors go to stderr.

use std::io::{self, IsTerminal, Write};

use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};
use serde::Serialize;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs: the API's own JSON.
    Json,
}

/// Results could not be printed.
#[derive(Debug, thiserror::Error)]
pub enum PrintError {
    /// Stdout refused them.
    #[error("cannot write the result to stdout: {0}")]
    Stdout(#[from] io::Error),
    /// Never with our own types.
    #[error("cannot write the result as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Prints `text` and a newline. A reader that has gone away (`bedplate … | head`) is no failure.
///
/// # Errors
/// See [`PrintError`].
pub fn line(text: &str) -> Result<(), PrintError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

/// Prints `value` as indented JSON.
///
/// # Errors
/// See [`PrintError`].
pub fn json(value: &impl Serialize) -> Result<(), PrintError> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Prints `items` as JSON, or as a table with one row each; `empty` is what a person reads when there are none.
///
/// # Errors
/// See [`PrintError`].
pub fn list<T: Serialize>(
    format: Format,
    items: &[T],
    empty: &str,
    header: &[&str],
    row: impl Fn(&T) -> Vec<Cell>,
) -> Result<(), PrintError> {
    match format {
        Format::Json => json(&items),
        Format::Table if items.is_empty() => {
            note(empty);
            Ok(())
        }
        Format::Table => line(&table(header, items.iter().map(row)).trim_fmt()),
    }
}

/// Says something that is not a result.
pub fn note(text: &str) {
    eprintln!("{text}");
}

/// Whether to colour what goes to stdout: only on a terminal that knows colours, and not where NO_COLOR says otherwise.
pub fn colours() -> bool {
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && !dumb
}

/// A table without lines, upper-case headings; a terminal's width is the limit, and without a terminal there is none, so
/// that programs can count on one line per row.
fn table(header: &[&str], rows: impl Iterator<Item = Vec<Cell>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).force_no_tty();
    if let Some(width) = terminal_width() {
        table.set_width(width).set_content_arrangement(ContentArrangement::Dynamic);
    }
    if colours() {
        table.enforce_styling();
    }
    table.set_header(header.iter().map(|h| Cell::new(h).add_attribute(Attribute::Bold)));
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

fn terminal_width() -> Option<u16> {
    let out = io::stdout();
    let size = out.is_terminal().then(|| rustix::termios::tcgetwinsize(&out).ok()).flatten()?;
    (size.ws_col > 0).then_some(size.ws_col)
}

/// A cell that says how well something stands.
pub fn state(text: &str, health: Health) -> Cell {
    let colour = match health {
        Health::Good => Color::Green,
        Health::Busy => Color::Yellow,
        Health::Bad => Color::Red,
        Health::Off => return Cell::new(text),
    };
    Cell::new(text).fg(colour)
}

/// How well something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// As it should be.
    Good,
    /// On its way.
    Busy,
    /// Needs somebody.
    Bad,
    /// Not meant to run.
    Off,
}

/// `value`, or a dash.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

/// The name that serde gives a plain enum variant, for tables: the same word as in JSON, with spaces.
pub fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word.replace('_', "-"),
        _ => "?".to_owned(),
    }
}

/// A number of bytes, in binary units with one decimal: `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    // A float is exact enough for one decimal.
    let (mut value, mut unit) = (n as f64, 0);
    // 1023.95 would print as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A number of seconds, in the one or two largest units: `3m 20s`, `5d 2h`.
pub fn duration(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, _) => format!("{m}m {s}s"),
        (0, ..) => format!("{h}h {m}m"),
        _ => format!("{d}d {h}h"),
    }
}

/// Seconds since 1970 as UTC: `2026-11-21 09:05:59`.
pub fn time(seconds: u64) -> String {
    let days = seconds / 86_400;
    // Count from 0000-03-01, so that a leap day is the last day of its year; 400 years have 146097 days.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months of 31 and 30 days from March on repeat every five: 153 days.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_agree_with_the_calendar() {
        // Each checked with `date -u -d @N`.
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (951_868_799, "2000-02-29 23:59:59"),
            (1_709_251_200, "2024-03-01 00:00:00"),
            (1_795_251_959, "2026-11-21 09:05:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(time(seconds), text);
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes((1 << 30) - 1), "1.0 GiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(duration(59), "59s");
        assert_eq!(duration(200), "3m 20s");
        assert_eq!(duration(86_400 * 5 + 7300), "5d 2h");
    }

    #[test]
    fn a_table_has_one_line_per_row_and_no_escape_codes_when_not_on_a_terminal() {
        let rows = [vec![Cell::new("a"), state("ready", Health::Good)]];
        let text = table(&["NAME", "STATE"], rows.into_iter()).trim_fmt();
        assert_eq!(text.lines().collect::<Vec<_>>(), ["NAME  STATE", "a     ready"]);
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }

    #[test]
    fn words_are_those_of_the_json() {
        assert_eq!(word(&bedplate_api::node::VmPhase::BackOff), "back-off");
    }
}
