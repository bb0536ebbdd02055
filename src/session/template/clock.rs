//! What time it is in a template: `strftime_now`.
//!
//! In UTC, since there is no time zone database without a dependency, and since a prompt shouldn't depend on where the machine stands.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Seconds since 1970, negative before.
pub(super) fn unix_seconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(d) => i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        Err(e) => i64::try_from(e.duration().as_secs()).map_or(i64::MIN, |s| -s),
    }
}

struct Date {
    year: i64,
    /// 1 to 12.
    month: i64,
    day: i64,
    /// 1 to 366.
    day_of_year: i64,
    /// 0 is Sunday.
    weekday: i64,
}

/// The Gregorian date of a day counted from 1970-01-01 (Hinnant's `civil_from_days`: years begin in March, so that the leap day is last).
fn date(days: i64) -> Date {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let march_day = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * march_day + 2) / 153;
    let day = march_day - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize - 1];
    let day_of_year = before + day + i64::from(leap && month > 2);
    Date { year, month, day, day_of_year, weekday: (days + 4).rem_euclid(7) }
}

/// C's `strftime` in the C locale. `Err` holds a directive that it doesn't know.
pub(super) fn strftime(format: &str, seconds: i64) -> Result<String, String> {
    // Beyond these years the arithmetic is right and the answer useless.
    let seconds = seconds.clamp(-1_000_000_000_000, 1_000_000_000_000);
    let d = date(seconds.div_euclid(86_400));
    let second_of_day = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let (weekday, month) = (DAYS[d.weekday as usize], MONTHS[d.month as usize - 1]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = chars.next();
        }
        let number = |n: i64, width: usize| if unpadded { n.to_string() } else { format!("{n:0width$}") };
        let nested = |format: &str| strftime(format, seconds);
        out += &match directive {
            Some('Y') => d.year.to_string(),
            Some('y') => number(d.year.rem_euclid(100), 2),
            Some('m') => number(d.month, 2),
            Some('d') => number(d.day, 2),
            Some('e') => format!("{:2}", d.day),
            Some('j') => number(d.day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).into(),
            Some('B') => month.into(),
            Some('b' | 'h') => month[..3].into(),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('w') => d.weekday.to_string(),
            Some('u') => ((d.weekday + 6) % 7 + 1).to_string(),
            Some('F') => nested("%Y-%m-%d")?,
            Some('T' | 'X') => nested("%H:%M:%S")?,
            Some('R') => nested("%H:%M")?,
            Some('D' | 'x') => nested("%m/%d/%y")?,
            Some('c') => nested("%a %b %e %H:%M:%S %Y")?,
            Some('s') => seconds.to_string(),
            // Python's datetime.now() has no time zone, which these then leave empty.
            Some('z' | 'Z') => String::new(),
            Some('%') => "%".into(),
            Some(other) => return Err(format!("%{}{other}", if unpadded { "-" } else { "" })),
            None => return Err("%".into()),
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        // 2000-02-29, 2024-12-31 and 1969-12-31, checked with `date -u -d @N`.
        let f = "%Y-%m-%d %H:%M:%S %j %a %A %b %B %d %-d %e %y %I %p %u %w";
        assert_eq!(
            strftime(f, 951_782_400).unwrap(),
            "2000-02-29 00:00:00 060 Tue Tuesday Feb February 29 29 29 00 12 AM 2 2"
        );
        assert_eq!(
            strftime(f, 1_735_689_599).unwrap(),
            "2024-12-31 23:59:59 366 Tue Tuesday Dec December 31 31 31 24 11 PM 2 2"
        );
        assert_eq!(
            strftime(f, -1).unwrap(),
            "1969-12-31 23:59:59 365 Wed Wednesday Dec December 31 31 31 69 11 PM 3 3"
        );
        assert_eq!(
            strftime("%F %T %R %D %c %s %% %-m/%-d", 1_709_510_405).unwrap(),
            "2024-03-04 00:00:05 00:00 03/04/24 Mon Mar  4 00:00:05 2024 1709510405 % 3/4"
        );
    }

    #[test]
    fn unknown_directives_are_named() {
        assert_eq!(strftime("%Q", 0), Err("%Q".into()));
        assert_eq!(strftime("%-q", 0), Err("%-q".into()));
        assert_eq!(strftime("100%", 0), Err("%".into()));
        assert!(strftime("%Y", i64::MIN).is_ok() && strftime("%c", i64::MAX).is_ok());
    }

    /// Every day of 800 years follows the one before.
    #[test]
    fn days_count_up() {
        let mut last = date(-146_097);
        for days in -146_096..146_097 {
            let d = date(days);
            let next_year = d.year == last.year + 1 && d.day_of_year == 1 && last.day_of_year >= 365;
            assert!(next_year || (d.year == last.year && d.day_of_year == last.day_of_year + 1), "{days}");
            assert!(d.day == last.day + 1 || (d.day == 1 && (28..=31).contains(&last.day)), "{days}");
            assert_eq!(d.weekday, (last.weekday + 1) % 7);
            last = d;
        }
    }
}
