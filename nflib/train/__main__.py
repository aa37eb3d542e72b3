"""``python -m nflib.train MODEL ...``, see `nflib.train.command`."""

from nflib.train.command import main

if __name__ == "__main__":
    main()
