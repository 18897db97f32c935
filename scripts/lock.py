"""Print the environment this runs in as a constraints file: exact versions, no local build tags, without this package itself."""

from importlib.metadata import distributions

if __name__ == "__main__":
    pins = {
        d.metadata["Name"].lower().replace("_", "-"): d.version.split("+")[0]
        for d in distributions()
    }
    print(
        "# Made by `make lock`: every version that the README's commands install, build tools included."
    )
    for name in sorted(pins):
        if name != "tipr-nb":
            print(f"{name}=={pins[name]}")
