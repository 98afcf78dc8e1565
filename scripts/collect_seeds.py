"""Collect the results.json files of runs that differ in their seed in one table: mean accuracy and its 95 % t-interval over seeds.

    python scripts/collect_seeds.py Data/seed-*/results.json
"""

import sys

from import_notebook import import_definitions

if __name__ == "__main__":
    notebook = import_definitions()
    try:
        table = notebook.collect_results(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")
    print(table.to_string(float_format="{:.1f}".format, na_rep="-"))
