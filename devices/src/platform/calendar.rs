//! Seconds since 1970 ⇄ a date and time of day in UTC, proleptic Gregorian calendar, for years 1970 to 2099 and beyond.

/// A moment in UTC as a clock shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Of our era.
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
    /// 1 is Sunday.
    pub weekday: u8,
}

const DAY: i64 = 86_400;
/// Days from 1 March 2000, where a 400-year cycle of leap years begins, back to 1 January 1970.
const EPOCH_TO_MARCH_2000: i64 = 11_017;
const DAYS_IN_400_YEARS: i64 = 146_097;
/// Days before each month of a year that begins in March, so that the leap day comes last.
const BEFORE_MONTH: [i64; 12] = [0, 31, 61, 92, 122, 153, 184, 214, 245, 275, 306, 337];

/// Days before year `n` of a cycle that begins in March of a year divisible by 400.
const fn before_year(n: i64) -> i64 {
    n * 365 + n / 4 - n / 100 + n / 400
}

impl Moment {
    /// `seconds` since 1970.
    pub fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(DAY);
        let time = seconds.rem_euclid(DAY);
        let since = days - EPOCH_TO_MARCH_2000;
        let cycle = since.div_euclid(DAYS_IN_400_YEARS);
        let day_of_cycle = since.rem_euclid(DAYS_IN_400_YEARS);
        // 366 days a year can only guess too low, and by less than two years.
        let mut year = day_of_cycle / 366;
        while before_year(year + 1) <= day_of_cycle {
            year += 1;
        }
        let day_of_year = day_of_cycle - before_year(year);
        let march_month = BEFORE_MONTH.iter().rposition(|before| *before <= day_of_year).unwrap_or(0);
        let (month, next_year) = if march_month < 10 { (march_month + 3, 0) } else { (march_month - 9, 1) };
        Self {
            year: 2000 + cycle * 400 + year + next_year,
            month: month as u8,
            day: (day_of_year - BEFORE_MONTH[march_month] + 1) as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
            // 1 January 1970 was a Thursday.
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    /// Fields out of their range count on into the next larger one; the weekday is not looked at.
    pub fn to_unix(self) -> i64 {
        let month = i64::from(self.month) - 3;
        let year = self.year - 2000 + month.div_euclid(12);
        let (cycle, year) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = BEFORE_MONTH[month.rem_euclid(12) as usize] + i64::from(self.day) - 1;
        let days = EPOCH_TO_MARCH_2000 + cycle * DAYS_IN_400_YEARS + before_year(year) + day_of_year;
        days * DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        let ymd = |s| {
            let m = Moment::from_unix(s);
            (m.year, m.month, m.day, m.hour, m.minute, m.second, m.weekday)
        };
        assert_eq!(ymd(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(ymd(951_782_399), (2000, 2, 28, 23, 59, 59, 2));
        assert_eq!(ymd(951_782_400), (2000, 2, 29, 0, 0, 0, 3));
        assert_eq!(ymd(951_868_800), (2000, 3, 1, 0, 0, 0, 4));
        assert_eq!(ymd(1_795_219_200), (2026, 11, 21, 0, 0, 0, 7));
        assert_eq!(ymd(4_102_444_799), (2099, 12, 31, 23, 59, 59, 5));
    }

    #[test]
    fn every_day_of_a_cycle_round_trips() {
        for day in 0..DAYS_IN_400_YEARS {
            let seconds = day * DAY + 45_296;
            assert_eq!(Moment::from_unix(seconds).to_unix(), seconds);
        }
    }
}
