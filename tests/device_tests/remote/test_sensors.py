"""Answers of phones and of Linux, understood; what is no measurement, left out. No device."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_tests.remote import conditions, sensors

PIXEL_ZONES = """zone 0 43200 BIG
zone 1 41900 MID
zone 2 40100 LITTLE
zone 3 39000 G3D
zone 4 61000 charger_skin_therm
zone 5 36500 battery
khz cpu0 1803000
khz cpu7 2850000
power Battery|83|-412000|312|Discharging|
power USB|||||0
"""

QUALCOMM_ZONES = """zone 0 48100 cpu-0-0-usr
zone 1 51300 cpu-1-3-usr
zone 2 66000 gpuss-0-usr
zone 3 100 soc
zone 4 4213 vbat
zone 5 -273000 cpu-dead-usr
zone 6 0 cpu-off-usr
zone 7 80000 pm8350b-bcl-lvl0
"""

# The form of AOSP's ThermalManagerService.dumpInternal and BatteryService.dumpInternal.
DUMPSYS = """IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
 Temperature{mValue=99.0, mType=0, mName=CPU_OLD, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
 Temperature{mValue=45.7, mType=0, mName=CPU0, mStatus=0}
 Temperature{mValue=47.25, mType=0, mName=CPU7, mStatus=0}
 Temperature{mValue=55.0, mType=1, mName=GPU0, mStatus=0}
 Temperature{mValue=NaN, mType=3, mName=skin, mStatus=0}
Temperature static thresholds from HAL:
 TemperatureThreshold{mType=0, mName=CPU0, mHotThrottlingThresholds=[NaN, 95.0]}
cpu MHz : 1800.5
Current Battery Service state:
  AC powered: false
  USB powered: true
  Max charging current: 500000
  status: 2
  health: 2
  level: 71
  temperature: 287
"""


def test_the_hottest_sensor_of_the_processor_decides() -> None:
    reading = sensors.parse(PIXEL_ZONES)
    assert reading.hottest == ("BIG", 43.2)
    assert reading.cpu_sensors == {"BIG", "MID", "LITTLE"}
    assert reading.temperature_c["battery"] == 36.5
    assert reading.cpu_mhz == {"cpu0": 1803.0, "cpu7": 2850.0}
    assert reading.battery == sensors.Battery(83, -412, 31.2, "Discharging")
    assert reading.charging is False


def test_what_is_no_temperature_is_left_out() -> None:
    reading = sensors.parse(QUALCOMM_ZONES)
    assert set(reading.temperature_c) == {"cpu-0-0-usr", "cpu-1-3-usr", "gpuss-0-usr"}
    assert reading.hottest == ("cpu-1-3-usr", 51.3)


def test_without_a_sensor_of_the_processor_the_hottest_zone_decides() -> None:
    assert sensors.parse("zone 0 31000 battery\nzone 1 35000 skin\n").hottest == ("skin", 35.0)


def test_without_zones_there_is_no_temperature() -> None:
    assert sensors.parse("").hottest is None
    assert sensors.parse("").charging is None


def test_androids_services_are_understood() -> None:
    reading = sensors.parse(DUMPSYS)
    assert reading.temperature_c == {"CPU0": 45.7, "CPU7": 47.25, "GPU0": 55.0}
    assert reading.hottest == ("CPU7", 47.25)
    assert reading.cpu_mhz == {"cpu0": 1800.5}
    assert reading.battery == sensors.Battery(71, None, 28.7, "Charging")
    assert reading.charging is True


def test_several_zones_of_one_type_are_told_apart() -> None:
    reading = sensors.parse("zone 3 40000 tsens_tz_sensor\nzone 10 41000 tsens_tz_sensor\n")
    assert reading.temperature_c == {"tsens_tz_sensor:3": 40.0, "tsens_tz_sensor:10": 41.0}
    assert len(reading.cpu_sensors) == 2


@pytest.mark.parametrize(("raw", "celsius"), [("45000", 45.0), ("45", 45.0), ("453", 45.3)])
def test_old_kernels_units_are_recognized(raw: str, celsius: float) -> None:
    assert sensors.parse(f"zone 0 {raw} mtktscpu").temperature_c == {"mtktscpu": celsius}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu-0-0-usr", True), ("CPU0", True), ("mtktscpu", True), ("cpuss-1", True),
        ("tsens_tz_sensor5", True), ("x86_pkg_temp", True), ("coretemp", True), ("BIG", True),
        ("LITTLE", True), ("MID", True), ("bigcore0-thermal", True), ("soc-thermal", True),
        ("gpuss-0", False), ("G3D", False), ("battery", False), ("skin", False),
        ("usb-therm", False), ("modem0", False), ("ambient", False), ("humidity", False),
    ],
)  # fmt: skip
def test_sensors_of_the_processor_are_known_by_their_names(name: str, expected: bool) -> None:
    assert sensors.is_cpu_sensor(name) is expected


def test_an_endless_answer_is_cut() -> None:
    reading = sensors.parse("".join(f"zone {i} 40000 cpu{i}{'x' * 500}\n" for i in range(5000)))
    assert len(reading.temperature_c) <= sensors.MAXIMUM_SENSORS
    assert max(map(len, reading.temperature_c)) <= sensors.MAXIMUM_NAME_CHARACTERS + 5


TEXT = st.text(max_size=25)
LINES = st.lists(
    st.one_of(
        TEXT,
        st.builds("zone {} {} {}".format, TEXT, TEXT, TEXT),
        st.builds("zone {} {} {}".format, st.integers(), st.integers(), TEXT),
        st.builds("power {}|{}|{}".format, st.sampled_from(["Battery", "USB"]), TEXT, TEXT),
        st.builds("clock cpu{}|{}|{}|{}".format, st.integers(), TEXT, TEXT, st.integers()),
        st.builds("Temperature{{mValue={}, mType={}, mName={}".format, st.floats(), st.integers(),
                  TEXT),
        st.sampled_from(["Current Battery Service state", "memory MemTotal: 5 kB", "present 0-"]),
        st.builds("status: {}".format, st.integers()),
    )
)  # fmt: skip


@given(LINES)
def test_no_answer_breaks_the_parsers(lines: list[str]) -> None:
    text = "\n".join(lines)
    reading = sensors.parse(text)
    assert all(-40 < celsius < 150 for celsius in reading.temperature_c.values())
    assert all(name.isprintable() for name in reading.temperature_c)
    device = conditions.parse_device(text, "serial")
    assert all(len(v) <= 200 for v in vars(device).values() if isinstance(v, str))
    conditions.parse_clocks(text)


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A folder with zones, clocks and a battery, laid out as sysfs is."""
    files = {
        "class/thermal/thermal_zone0/type": "cpu-thermal",
        "class/thermal/thermal_zone0/temp": "41500",
        "class/thermal/thermal_zone12/type": "gpu thermal",
        "class/thermal/thermal_zone12/temp": "39000",
        "class/thermal/thermal_zone13/type": "no value",
        "class/power_supply/BAT0/type": "Battery", "class/power_supply/BAT0/capacity": "77",
        "class/power_supply/BAT0/current_now": "512000",
        "class/power_supply/BAT0/status": "Charging",
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1200000",
        "devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
        "devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "300000",
        "devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1800000",
        "devices/system/cpu/cpufreq/boost": "1",
        "devices/system/cpu/present": "0-3,6",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    return tmp_path


def run(command: str, sysfs: Path) -> str:
    """The answer of this machine's shell, with another folder in the place of /sys."""
    script = command.replace("/sys/", f"{sysfs}/")
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("command", [sensors.COMMAND, sensors.POLL_COMMAND])
def test_the_command_reads_what_sysfs_shows(command: str, sysfs: Path) -> None:
    reading = sensors.parse(run(command, sysfs))
    assert reading.temperature_c == {"cpu-thermal": 41.5, "gpu thermal": 39.0}
    assert reading.cpu_mhz == {"cpu0": 1200.0}
    assert reading.battery == sensors.Battery(77, 512, None, "Charging")
    assert reading.charging is True


def test_the_load_is_read_before_and_after_a_run_only(sysfs: Path) -> None:
    def load(command: str) -> float | None:
        script = command.replace("/proc/loadavg", f"{sysfs}/loadavg")
        return sensors.parse(run(script, sysfs)).load_1m

    assert load(sensors.COMMAND) is None
    (sysfs / "loadavg").write_text("2.31 1.07 0.98 3/512 4711\n")
    assert load(sensors.COMMAND) == 2.31
    assert load(sensors.POLL_COMMAND) is None
    assert sensors.parse("load much 1 2\n").load_1m is None


def test_the_command_is_content_with_an_empty_sysfs(tmp_path: Path) -> None:
    assert sensors.parse(run(sensors.COMMAND, tmp_path)).temperature_c == {}


def test_polling_starts_no_process_where_sysfs_speaks(sysfs: Path) -> None:
    script = sensors.POLL_COMMAND.replace("/sys/", f"{sysfs}/")
    done = subprocess.run(
        ["sh", "-c", f"PATH=/nowhere\n{script}"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert sensors.parse(done.stdout).cpu_mhz == {"cpu0": 1200.0}


def test_the_clock_regime_is_read(sysfs: Path) -> None:
    clocks = conditions.parse_clocks(run(conditions.CLOCKS_COMMAND, sysfs))
    assert clocks == conditions.Clocks({"cpu0": "schedutil"}, {"cpu0": (300.0, 1800.0)})


def test_this_machine_describes_itself(sysfs: Path) -> None:
    device = conditions.parse_device(run(conditions.DEVICE_COMMAND, sysfs), "abc")
    assert device.serial == "abc"
    assert device.kernel == subprocess.check_output(["uname", "-r"], text=True).strip()
    assert device.cores == 5
    assert device.memory_bytes is not None and device.memory_bytes > 2**28
    assert device.android_sdk is None


def test_a_phone_describes_itself_by_its_properties() -> None:
    text = (
        "manufacturer Google\nmodel Pixel 9\nsoc_maker Google\nsoc Tensor G4\n"
        "platform zumapro\nbuild google/tokay/tokay:15/AB1/1:user/release-keys\n"
        "abi arm64-v8a\nandroid_sdk 35\nmemory MemTotal:       11859316 kB\npresent 0-7\n"
        "kernel 6.1.99-android14\nmachine aarch64\n"
    )
    device = conditions.parse_device(text, "serial")
    assert device == conditions.Device(
        "serial", "Google", "Pixel 9", "Google Tensor G4",
        "google/tokay/tokay:15/AB1/1:user/release-keys", "6.1.99-android14", "arm64-v8a", 8,
        11859316 * 1024, 35,
    )  # fmt: skip
