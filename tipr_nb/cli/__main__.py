"`python -m tipr_nb.cli`, which `accelerate launch -m` needs: the same as `tipr`."
from tipr_nb.cli.commands import main

if __name__ == "__main__":
    main()
