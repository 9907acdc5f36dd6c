"""``python -m seodang``, and the command ``seodang``."""


def main() -> None:
    """Run the command line; a Ctrl-C while it is being loaded ends it quietly."""
    try:
        from seodang.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
